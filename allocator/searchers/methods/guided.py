"""Guided evolution: a surrogate ranks proposals, the best of them race, and the surrogate learns from outcomes.

Exchange evolution measures each offspring to learn whether it is good. Here proposals are cheap, because the surrogate
ranks them without a measurement. If the evaluator has gradients, the loss is expanded whenever the centre moves. A
knapsack then finds the best allocations near the centre, for the surrogate and for random samples of it (Thompson
sampling, 1933). Each of these proposals can exchange several units at once. Without gradients, thousands of exchanges
are drawn from the best allocations so far. Units with little to lose are made sparser more often. Units with much to
gain are made denser more often. The surrogate ranks the results.

Only a few proposals are measured, in a race on growing token sets. If blocks can be removed, some entrants remove or
restore a contiguous run of blocks. The surrogate does not rank these entrants.
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
"""Share of exchanged units that are drawn uniformly, without the surrogate."""

_RUNS_EVERY = 8
"""If blocks can be removed, one of this many entrants removes or restores a run of blocks."""

_RADII = 3
"""The knapsack searches within 1, 2, ... up to this many levels of the centre, in turn."""

_CLOSE = 2e-7
"""Error that a knapsack may make for each unit, as a share of the loss. With fewer than hundreds of units, the total
error is too small to matter."""

_SETTLED = 4
"""Number of drawn proposals per entrant that are fitted to the budget exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedSettings:
    """Settings of guided evolution.

    Attributes:
        generations: Maximum number of races.
        patience: Races without a better allocation after which the search ends.
        proposals: Exchanges that are drawn for each race.
        entrants: Proposals that race.
        survivors: Maximum number of entrants of a race that are measured on all tokens.
        parents: Number of the best allocations so far from which exchanges are drawn.
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
    """Search from the memory's centre, and return why the search ended. See the docstring of the module."""
    stale = 0
    for turn in range(settings.generations):
        yield from memory.expand()
        entrants = propose(memory, settings, np.random.default_rng([seed, turn]))
        if not entrants:
            return "nothing is left to propose"
        yield from race(memory, entrants, settings.survivors)
        stale = 0 if memory.advance() else stale + 1
        if stale == settings.patience:
            return f"nothing better in {stale} races"
    return f"all {settings.generations} races are done"


def propose(memory: Memory, settings: GuidedSettings, rng: np.random.Generator) -> list[Allocation]:
    """Return the new allocations that the surrogate ranks best. Each fills the budget."""
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
    """Return new allocations that are best for the surrogate or for a sample of it.

    The first ones are for the surrogate itself, one for each radius around the centre. The others are for samples of
    the surrogate.
    """
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
    """Draw exchanges of the best allocations. Return those that the surrogate ranks best, fitted to the budget."""
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
    """Return copies of a parent with random exchanges applied, [count, U], not fitted to the budget.

    The surrogate predicts how the loss changes if a unit moves by one level. Units are drawn more often
    if this change is favourable.
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
    """Return a probability for each unit. Units with larger gains have larger ones; units that cannot move have 0."""
    if not can_u.any():
        return np.zeros(len(gain_u))
    rank_u = np.argsort(np.argsort(-np.where(can_u, gain_u, -np.inf), kind="stable"), kind="stable")
    weight_u = can_u * np.exp(-rank_u / max(1.0, can_u.sum() / 4))
    even_u = can_u / can_u.sum()
    return np.asarray((1 - _EXPLORATION) * weight_u / weight_u.sum() + _EXPLORATION * even_u)


def _find_rate(memory: Memory) -> float:
    """Return the loss that one unit of cost is worth.

    The last step of a unit leads from one level denser to its level at the centre. The result is the median over units
    of the loss that this step adds, divided by the cost that it saves.
    """
    arrays, table_ul, level_u = memory.arrays, memory.surrogate.table_ul, np.array(memory.centre)
    units = np.flatnonzero(level_u > 0)
    price_u = arrays.price_ul[units, level_u[units] - 1] - arrays.price_ul[units, level_u[units]]
    loss_u = table_ul[units, level_u[units]] - table_ul[units, level_u[units] - 1]
    dear = price_u > 0
    return max(0.0, float(np.median(loss_u[dear] / price_u[dear]))) if dear.any() else 0.0
