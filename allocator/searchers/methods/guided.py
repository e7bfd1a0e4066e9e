"""Guided evolution: a model of the loss ranks proposals, the best of them race, and the model learns from outcomes.

Exchange evolution measures each offspring to learn whether it is good. Here proposals are cheap. If the evaluator has
gradients, the loss is expanded whenever the centre moves. The proposals are then the best nearby allocations of the
model and of samples of it (Thompson, 1933), each found by a knapsack: exchanges of several units at once. Without
gradients, thousands of exchanges of the best allocations so far are drawn, favouring units with most to gain and least
to lose, and the model ranks them. Only a few proposals are measured, in a race on growing token sets. Where blocks can
be removed, some entrants remove or restore a contiguous run of blocks, which the model does not rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.core.errors import UserError
from allocator.core.space import Allocation
from allocator.searchers.generator import Script
from allocator.searchers.methods.evolution import move_run
from allocator.searchers.methods.race import race
from allocator.searchers.solvers.knapsack import knapsack_nearby
from allocator.searchers.surrogates.memory import Memory

_EXPLORATION = 0.25
"""Share of exchanged units that are drawn regardless of the model."""

_RUNS_EVERY = 8
"""Where blocks can be removed, one entrant in this many moves a run of blocks."""

_RADII = 3
"""The model's best allocations are sought within 1 to this many levels of the centre."""

_CLOSE = 2e-7
"""Share of the loss, for each unit, by which a knapsack of a sample may miss the optimum; too little to matter below
hundreds of units."""

_SETTLED = 4
"""Proposals that are fitted to the budget exactly, for each entrant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedSettings:
    """Settings of guided evolution.

    Attributes:
        generations: Most races.
        patience: Races without a better allocation after which the search ends.
        proposals: Exchanges that are drawn for each race.
        entrants: Proposals that race.
        survivors: Most entrants of a race that are measured on all tokens.
        parents: How many of the best allocations so far are exchanged.
        max_exchanges: A proposal differs from its parent by min(U{1..m}, U{1..m}) exchanges.
    """

    generations: int = 100
    patience: int = 4
    proposals: int = 2048
    entrants: int = 16
    survivors: int = 3
    parents: int = 3
    max_exchanges: int = 4

    def __post_init__(self) -> None:
        if min(self.generations, self.patience, self.entrants, self.survivors, self.parents, self.max_exchanges) < 1:
            raise UserError("search.guided: every setting must be at least 1")
        if self.proposals < self.entrants:
            raise UserError(f"search.guided.proposals: expected at least entrants ({self.entrants})")


def guided(memory: Memory, settings: GuidedSettings, seed: int) -> Script:
    """Search from the memory's centre, and return why the search ended. See the module's text."""
    stale = 0
    for turn in range(settings.generations):
        yield from memory.expand()
        entrants = propose(memory, settings, np.random.default_rng([seed, turn]))
        if not entrants:
            return "nothing is left that was not proposed"
        yield from race(memory, entrants, settings.survivors)
        stale = 0 if memory.advance() else stale + 1
        if stale == settings.patience:
            return f"nothing better in {stale} races"
    return f"all {settings.generations} races are done"


def propose(memory: Memory, settings: GuidedSettings, rng: np.random.Generator) -> list[Allocation]:
    """Return the new allocations that the model ranks best, each filling the budget."""
    found: dict[Allocation, None] = {}
    if all(unit.kept[-1] == 0 for unit in memory.space.units):
        runs = [
            move_run(memory.space, memory.centre, memory.budget, rng) for _ in range(settings.entrants // _RUNS_EVERY)
        ]
        found.update((child, None) for child in runs if not memory.is_measured_at_all(child))
    room = settings.entrants - len(found)
    if memory.gradients:
        found.update(dict.fromkeys(_minimise_samples(memory, room, rng)))
        return list(found)
    children = list(
        dict.fromkeys([*_minimise_samples(memory, settings.entrants // 4, rng), *_draw_children(memory, settings, rng)])
    )
    if children:
        order = np.argsort(memory.surrogate.predict(np.array(children)), kind="stable")
        found.update((children[place], None) for place in order[:room])
    return list(found)


def _minimise_samples(memory: Memory, count: int, rng: np.random.Generator) -> list[Allocation]:
    """Return the best allocations of the model and of samples of it within one, two and three levels of the centre."""
    surrogate = memory.surrogate
    slack = _CLOSE * len(memory.centre)
    found: dict[Allocation, None] = {}
    for index in range(count):
        table_ul = surrogate.table_ul if index < _RADII else surrogate.draw(rng)
        answer = knapsack_nearby(memory.arrays, table_ul, memory.centre, 1 + index % _RADII, slack)
        if not memory.is_measured_at_all(answer):
            found[answer] = None
    return list(found)


def _draw_children(memory: Memory, settings: GuidedSettings, rng: np.random.Generator) -> list[Allocation]:
    """Return exchanges of the best allocations that the model likes best, settled."""
    arrays, surrogate = memory.arrays, memory.surrogate
    parents = memory.rank()[: settings.parents]
    share = settings.proposals // len(parents)
    drawn = [draw_exchanges(memory, np.array(parent), share, settings.max_exchanges, rng) for parent in parents]
    levels_nu = np.unique(np.concatenate(drawn), axis=0)
    if not len(levels_nu):
        return []
    promise_n = surrogate.predict(levels_nu) + _find_rate(memory) * arrays.measure_excess(levels_nu)
    best = np.argsort(promise_n, kind="stable")[: _SETTLED * settings.entrants]
    children = [arrays.fit_to_budget(levels_nu[row], surrogate.table_ul) for row in best]
    return [child for child in children if not memory.is_measured_at_all(child)]


def draw_exchanges(
    memory: Memory, parent_u: np.ndarray, count: int, max_exchanges: int, rng: np.random.Generator
) -> np.ndarray:
    """Return a parent after exchanges, [count, U], not fitted to the budget.

    Units are drawn by the loss or gain that the model expects of one level more or less.
    """
    arrays, table_ul = memory.arrays, memory.surrogate.table_ul
    units = np.arange(len(parent_u))
    sparser_u, denser_u = np.minimum(parent_u + 1, arrays.last_u), np.maximum(parent_u - 1, 0)
    giving_u = _weigh_units(-(table_ul[units, sparser_u] - table_ul[units, parent_u]), parent_u < arrays.last_u)
    taking_u = _weigh_units(table_ul[units, parent_u] - table_ul[units, denser_u], parent_u > 0)
    levels_nu = np.repeat(parent_u[None], count, axis=0)
    if not giving_u.any() or not taking_u.any():
        return levels_nu[:0]
    times_n = rng.integers(1, max_exchanges + 1, size=(2, count)).min(0)
    rows = np.arange(count)
    for turn in range(max_exchanges):
        active = rows[times_n > turn]
        for weights_u, step in ((giving_u, 1), (taking_u, -1)):
            drawn = rng.choice(units, size=len(active), p=weights_u)
            size = step * (1 + (rng.random(len(active)) < 0.2))
            levels_nu[active, drawn] = np.clip(levels_nu[active, drawn] + size, 0, arrays.last_u[drawn])
    return levels_nu


def _weigh_units(gain_u: np.ndarray, can_u: np.ndarray) -> np.ndarray:
    """Return probabilities of units that fall with the rank of their gain; 0 for units that cannot move."""
    if not can_u.any():
        return np.zeros(len(gain_u))
    rank_u = np.argsort(np.argsort(-np.where(can_u, gain_u, -np.inf), kind="stable"), kind="stable")
    weight_u = can_u * np.exp(-rank_u / max(1.0, can_u.sum() / 4))
    even_u = can_u / can_u.sum()
    return np.asarray((1 - _EXPLORATION) * weight_u / weight_u.sum() + _EXPLORATION * even_u)


def _find_rate(memory: Memory) -> float:
    """Return the value of cost: the median over units of the loss of the last step for its price."""
    arrays, table_ul, level_u = memory.arrays, memory.surrogate.table_ul, np.array(memory.centre)
    units = np.flatnonzero(level_u > 0)
    price_u = arrays.price_ul[units, level_u[units] - 1] - arrays.price_ul[units, level_u[units]]
    loss_u = table_ul[units, level_u[units]] - table_ul[units, level_u[units] - 1]
    dear = price_u > 0
    return max(0.0, float(np.median(loss_u[dear] / price_u[dear]))) if dear.any() else 0.0
