"""EMO-PMS: evolutionary multi-objective search, divided over runs of blocks whose fronts are merged.

After Shang et al., "An EMO joint pruning with multiple sub-networks", 2023 (arXiv 2303.16212, first version). The
network is cut into contiguous groups of blocks. In every round each group evolves on its own: NSGA-II over its units
minimises costs and the error of the group's output features. Its input features come from its pruned predecessors. An
evaluation runs one group alone, so with K groups it costs 1/K of a whole one. Groups evolve side by side. Then comes
the joint step: every member of every local front replaces its group in the current network, and the impairment of the
whole network is measured. Fronts are merged by an exact (min, +) combination of impairments, and the best merged
schemes are measured.

The paper prunes convolutional networks filter by filter, and trains sub-networks to accept pruned features. Here levels
come from a store whose pruner has refitted them, and nothing is trained. The paper assumes one current network. A front
has none, and the paper leaves the choice open. Here a round continues from the known member nearest to a target on the
first cost's range: first the middle, then the quarters, the eighths and so on. Features are compared with those of the
dense model after the same block, token by token, without a feature selector. The paper also leaves open how impairments
are combined. (min, +) assumes that they add up, which the last measurement checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allocator.core.budget import Budget, find_ranges, fits
from allocator.core.errors import UserError
from allocator.core.front import non_dominated
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation, Cost, SearchSpace
from allocator.searchers.generator import GeneratorSearcher, Script
from allocator.searchers.methods.nsga import make_nsga
from allocator.searchers.problem import MethodSettings, SearchProblem

Levels = tuple[int, ...]
"""One level for each unit of a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmoPmsSettings(MethodSettings):
    """Settings of EMO-PMS.

    Attributes:
        groups: Number of runs of blocks into which the network is cut.
        rounds: How often groups evolve and are merged.
        generations: Generations of each group's evolution in a round.
        population: Members of each group's evolution. At most as many of its front take part in the joint step.
        schemes: Merged schemes that are measured on all tokens in a round.
        profile: Tokens on which groups and impairments are measured.
        tokens: Tokens on which schemes are measured.
    """

    groups: int = 4
    rounds: int = 6
    generations: int = 8
    population: int = 12
    schemes: int = 20
    profile: int = 1024
    tokens: int = 8192

    def __post_init__(self) -> None:
        counts = (self.groups, self.rounds, self.generations, self.schemes)
        if min(counts) < 1 or self.population < 4 or not 1 <= self.profile <= self.tokens:
            raise UserError(
                "search.emo_pms: expected groups, rounds, generations and schemes >= 1, population >= 4 and "
                f"1 <= profile <= tokens, found {', '.join(map(str, counts))}, {self.population}, {self.profile} and "
                f"{self.tokens}"
            )

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the measurements, increasing."""
        return tuple(sorted({self.profile, self.tokens}))

    @property
    def num_batches(self) -> int:
        """Batches at most, baselines included."""
        return 3 + self.rounds * (3 + self.generations)

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        known: dict[Allocation, float] = {}
        return GeneratorSearcher(emo_pms(problem, self, known), lambda: rank_front(problem, known))


def rank_front(problem: SearchProblem, known: Mapping[Allocation, float]) -> list[Allocation]:
    """Return the members of the front of measured allocations, of least loss first."""
    allocations = sorted(known, key=lambda allocation: (known[allocation], allocation))
    if not allocations:
        return []
    figures = [[known[a], *(problem.space.cost(a, cost) for cost in problem.costs)] for a in allocations]
    return [allocations[member] for member in sorted(non_dominated(np.array(figures, dtype=float)))]


def emo_pms(problem: SearchProblem, settings: EmoPmsSettings, known: dict[Allocation, float]) -> Script:
    """Search the front of the loss and of costs within a budget. See the module's text.

    Args:
        problem: Its objectives are the loss and costs.
        settings: Of the method.
        known: Filled with the loss of every scheme that is measured on all tokens.
    """
    space, budget, objectives = problem.space, problem.budget, problem.costs
    groups, span = _make_groups(space, settings.groups), find_ranges(space, budget, objectives[:1])[objectives[0]]
    bounded = [cost for cost, limit in budget.limits.items() if limit < space.cost(space.dense, cost)]
    costs = list(dict.fromkeys([*objectives, *bounded]))
    known.update(_collect_losses((yield [Request(allocation, settings.tokens) for allocation in problem.start])))
    bred: list[list[Levels]] = [[] for _ in groups]
    for number in range(settings.rounds):
        base = _find_nearest(space, objectives[0], known, _find_place(number), span)
        locals_ = [
            _Local(space, group, base, costs, first, settings, [problem.seed, number, index])
            for index, (group, first) in enumerate(zip(groups, bred, strict=True))
        ]
        for _ in range(settings.generations + 1):
            asked = [local.ask() for local in locals_]
            if not any(asked):
                break
            told = {o.request.key: o for o in (yield [request for requests in asked for request in requests])}
            for local, requests in zip(locals_, asked, strict=True):
                local.tell([told[request.key] for request in requests])
        bred = [local.front() for local in locals_]
        options = [list(dict.fromkeys([group.of(base), *front])) for group, front in zip(groups, bred, strict=True)]
        plugged = [
            [group.into(base, levels) for levels in members] for group, members in zip(groups, options, strict=True)
        ]
        candidates = dict.fromkeys(allocation for members in plugged for allocation in members)
        losses = _collect_losses((yield [Request(allocation, settings.profile) for allocation in candidates]))
        impairments = [[losses[allocation] - losses[base] for allocation in members] for members in plugged]
        merged = _merge(space, budget, objectives, costs, groups, options, impairments)
        new = [scheme for scheme in merged if scheme not in known]
        chosen = dict.fromkeys(round(index) for index in np.linspace(0, len(new) - 1, min(settings.schemes, len(new))))
        if chosen:
            known.update(_collect_losses((yield [Request(new[index], settings.tokens) for index in chosen])))
    return f"all {settings.rounds} rounds over {len(groups)} groups are done"


@dataclass(frozen=True, slots=True)
class _Group:
    """A contiguous run of blocks.

    Attributes:
        places: Indices of its units in the space.
        start: Its first block.
        end: The block after its last one.
    """

    places: tuple[int, ...]
    start: int
    end: int

    def of(self, allocation: Allocation) -> Levels:
        """Return the group's part of an allocation."""
        return tuple(allocation[index] for index in self.places)

    def into(self, allocation: Allocation, levels: Levels) -> Allocation:
        """Return an allocation with other levels for the group."""
        changed = dict(zip(self.places, levels, strict=True))
        return tuple(changed.get(index, level) for index, level in enumerate(allocation))


def _make_groups(space: SearchSpace, count: int) -> list[_Group]:
    """Cut the blocks that have units into ``count`` runs of nearly equal length, or one per block if they are fewer."""
    blocks = sorted({unit.block for unit in space.units})
    found = []
    for run in np.array_split(blocks, min(count, len(blocks))):
        start, end = int(run[0]), int(run[-1]) + 1
        places = tuple(index for index, unit in enumerate(space.units) if start <= unit.block < end)
        found.append(_Group(places, start, end))
    return found


class _Local:
    """The evolution of one group in one round: its costs, also the bounded ones, against the error of its output."""

    def __init__(
        self,
        space: SearchSpace,
        group: _Group,
        base: Allocation,
        costs: Sequence[Cost],
        first: Sequence[Levels],
        settings: EmoPmsSettings,
        seed: Sequence[int],
    ) -> None:
        self._space, self._group, self._costs, self._settings = space, group, costs, settings
        # later blocks are not run
        self._before = tuple(lv if unit.block < group.end else 0 for lv, unit in zip(base, space.units, strict=True))
        units = [space.units[index] for index in group.places]
        drawn = int(np.random.SeedSequence(seed).generate_state(1)[0])
        population = _make_population([unit.num_levels for unit in units], [group.of(base), *first], settings, drawn)
        self._nsga = make_nsga("nsga2", units, population, settings.population, 1 + len(costs), drawn)
        self._bred: Any = None

    def ask(self) -> list[Request]:
        """Return the next generation; empty if it holds nothing new."""
        self._bred = self._nsga.ask()
        return [self._request(row) for row in (() if self._bred is None else self._bred.get("X"))]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Select among parents and offspring."""
        if not outcomes:
            return
        costs = [[self._space.cost(outcome.request.allocation, cost) for cost in self._costs] for outcome in outcomes]
        self._bred.set("F", np.column_stack([[outcome.loss for outcome in outcomes], np.array(costs, dtype=float)]))
        self._nsga.tell(infills=self._bred)

    def front(self) -> list[Levels]:
        """Return the members of the front in the order of the first cost; evenly spaced ones if there are many."""
        best = self._nsga.opt
        order = np.lexsort((best.get("F")[:, 0], best.get("F")[:, 1]))
        places = dict.fromkeys(np.linspace(0, len(order) - 1, min(len(order), self._settings.population)).round())
        return [tuple(int(level) for level in best.get("X")[order[int(index)]]) for index in places]

    def _request(self, row: Sequence[int]) -> Request:
        allocation = self._group.into(self._before, tuple(int(level) for level in row))
        return Request(allocation, self._settings.profile, blocks=self._group.end)


def _make_population(
    lengths: Sequence[int], first: Sequence[Levels], settings: EmoPmsSettings, seed: int
) -> list[list[int]]:
    """Return distinct levels: the given ones, equal shares of every ladder, and random ones."""
    size, upper = settings.population, np.array(lengths) - 1
    rng = np.random.default_rng(seed)
    even = [tuple(np.round(share * upper).astype(int).tolist()) for share in np.linspace(0.0, 1.0, size)]
    kept = list(dict.fromkeys(first))[: size // 2]
    found: dict[Levels, None] = dict.fromkeys([*kept, *even])
    for _ in range(10 * size):
        if len(found) >= size:
            break
        found[tuple(rng.integers(0, upper + 1).tolist())] = None
    return [list(levels) for levels in found][:size]


def _find_place(number: int) -> float:
    """Return 1/2, 1/4, 3/4, 1/8, 5/8, ...: the numbers from 1 with their binary digits mirrored at the point."""
    digits = f"{number + 1:b}"[::-1]
    return int(digits, 2) / float(1 << len(digits))


def _find_nearest(
    space: SearchSpace, cost: Cost, known: Mapping[Allocation, float], share: float, span: tuple[int, int]
) -> Allocation:
    """Return the member of the known front that is nearest to a share of the range of a cost."""
    allocations = list(known)
    spent = np.array([space.cost(allocation, cost) for allocation in allocations])
    front = non_dominated(np.column_stack([spent, [known[allocation] for allocation in allocations]]))
    low, high = span
    return allocations[min(front, key=lambda member: abs(spent[member] - low - share * (high - low)))]


def _merge(
    space: SearchSpace,
    budget: Budget,
    objectives: Sequence[Cost],
    costs: Sequence[Cost],
    groups: Sequence[_Group],
    options: Sequence[Sequence[Levels]],
    impairments: Sequence[Sequence[float]],
) -> list[Allocation]:
    """Return the exact front within the budget of the sum of impairments and the objectives: one option per group.

    ``costs`` are the objectives and the other costs that the budget bounds. A scheme that is better in those may fit
    where another does not.
    """
    figures, schemes = np.zeros((1, 1 + len(costs))), np.zeros((1, 0), dtype=np.int64)
    for group, members, losses in zip(groups, options, impairments, strict=True):
        units = [space.units[index] for index in group.places]
        spent = [
            [sum(u.costs(cost)[level] for u, level in zip(units, levels, strict=True)) for cost in costs]
            for levels in members
        ]
        added = np.column_stack([losses, np.array(spent, dtype=float)])
        figures = (figures[:, None] + added).reshape(-1, added.shape[1])
        schemes = np.column_stack(
            [schemes.repeat(len(members), axis=0), np.tile(np.arange(len(members)), len(schemes))]
        )
        best = non_dominated(figures)
        figures, schemes = figures[best], schemes[best]
    inside, rows = list[Allocation](), list[int]()
    for row, scheme in enumerate(schemes.tolist()):
        allocation = space.dense
        for group, members, pick in zip(groups, options, scheme, strict=True):
            allocation = group.into(allocation, members[pick])
        if fits(space, allocation, budget):
            inside.append(allocation)
            rows.append(row)
    return [inside[index] for index in non_dominated(figures[rows, : 1 + len(objectives)])]


def _collect_losses(outcomes: Sequence[Outcome]) -> dict[Allocation, float]:
    return {outcome.request.allocation: outcome.loss for outcome in outcomes}
