"""One profile for every budget: a whole front from a chain of searches. Each continues the one before.

The loss of a unit hardly depends on how sparse the others are. So one model of the loss serves every budget: its
curvatures are measured once, and it learns from the outcomes of all budgets. The best allocation of a budget, fitted to
the next one, is a better start than any rule. What is left for each budget is one expansion of the loss, knapsacks, and
a race of their answers. Between budgets, the model's best allocations are measured directly. Budgets are searched from
the loosest to the tightest and, in a further pass, back again. Budgets on several costs form a grid. There are as many
expansions as budgets, and they cost most of the effort, so they are on the last fidelity but one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from allocator.core.budget import Budget, find_ranges, fits
from allocator.core.errors import UserError
from allocator.core.protocols import Searcher
from allocator.core.space import Cost, SearchSpace
from allocator.searchers.generator import GeneratorSearcher, Script
from allocator.searchers.methods.guided import GuidedSettings, propose
from allocator.searchers.methods.race import race
from allocator.searchers.methods.trust_region import probe
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.surrogates.memory import Memory


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """Settings of a sweep of budgets.

    Attributes:
        points: Number of budgets; approximate for a grid over several costs.
        passes: How often all budgets are searched, alternately from the loosest to the tightest and back.
        entrants: Allocations that race at each budget.
        survivors: Most entrants of a race that are measured on all tokens.
    """

    points: int = 18
    passes: int = 1
    entrants: int = 8
    survivors: int = 2

    def __post_init__(self) -> None:
        if min(self.points, self.passes, self.entrants, self.survivors) < 1:
            raise UserError("search.sweep: every setting must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepMethod(MethodSettings):
    """The sweep of budgets as a search method, with its settings under ``search.tokens`` and ``search.sweep``."""

    tokens: tuple[int, ...] = (512, 2048, 8192)
    sweep: SweepSettings = field(default_factory=SweepSettings)

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the measurements, increasing."""
        return self.tokens

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        space, within, costs, points = problem.space, problem.budget, problem.costs, self.sweep.points
        limits = make_budgets(space, within, costs, points)
        nearby = [make_nearby_budgets(space, within, costs, points, budget) for budget in limits]
        memory = Memory(space, limits[0], problem.start, self.tokens, expanding=self.tokens[-2:][0])
        return GeneratorSearcher(_run(memory, problem, list(zip(limits, nearby, strict=True)), self.sweep), memory.rank)


def make_budgets(space: SearchSpace, within: Budget, objectives: Sequence[Cost], points: int) -> list[Budget]:
    """Return budgets that span the front of some costs, evenly, from the loosest to the tightest.

    If the dense model is not within ``within``, the loosest budget is ``within`` itself, and there is one more.

    Args:
        space: The search space.
        within: Limits that all budgets keep.
        objectives: The costs.
        points: Number of budgets; approximate for several costs.
    """
    ranges, steps = find_ranges(space, within, objectives), _steps(objectives, points)
    found = []
    for down in sorted(itertools.product(range(steps), repeat=len(objectives)), key=lambda each: (sum(each), each)):
        limits = {
            cost: high - (high - low) * step // steps
            for step, (cost, (low, high)) in zip(down, ranges.items(), strict=True)
        }
        budget = Budget(**{**within.limits, **limits})
        if not fits(space, space.dense, budget):  # otherwise there is nothing to search
            found.append(budget)
    return found or [within]


def make_nearby_budgets(
    space: SearchSpace, within: Budget, objectives: Sequence[Cost], points: int, budget: Budget
) -> list[Budget]:
    """Return budgets that are a third of a step looser or tighter in every cost than one of :func:`make_budgets`."""
    steps = 3 * _steps(objectives, points)
    found = []
    for signs in itertools.product((1, -1), repeat=len(objectives)):
        limits = {
            cost: min(budget.limits.get(cost, high) + sign * (high - low) // steps, high)
            for sign, (cost, (low, high)) in zip(signs, find_ranges(space, within, objectives).items(), strict=True)
        }
        near = Budget(**{**within.limits, **limits})
        if fits(space, space.sparsest, near) and not fits(space, space.dense, near):
            found.append(near)
    return found


def _steps(objectives: Sequence[Cost], points: int) -> int:
    """Return the number of budgets on each cost, the loosest among them."""
    return max(2, int(np.rint((points + 1) ** (1 / len(objectives)))))


def _run(
    memory: Memory,
    problem: SearchProblem,
    limits: Sequence[tuple[Budget, Sequence[Budget]]],
    settings: SweepSettings,
) -> Script:
    yield from memory.measure(problem.start, memory.tokens[-1])
    guided = GuidedSettings(entrants=settings.entrants, survivors=settings.survivors)
    for number in range(settings.passes):
        moved = False
        for place, (budget, nearby) in enumerate(limits if number % 2 == 0 else limits[::-1]):
            yield from memory.move(budget)
            yield from memory.expand()
            if not memory.gradients:
                yield from probe(memory, memory.tokens[0], len(memory.centre))
            rng = np.random.default_rng([problem.seed, number, place])
            yield from race(memory, propose(memory, guided, rng), settings.survivors)
            moved = memory.advance() or moved
            yield from memory.measure([memory.find_best_within(near) for near in nearby], memory.tokens[-1])
        if not moved:
            return f"nothing better within any of {len(limits)} budgets"
    return f"all {settings.passes} passes over {len(limits)} budgets are done"
