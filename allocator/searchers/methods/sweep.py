"""One profile, every budget: a whole front from a chain of searches that go on from each other.

What a unit loses hardly depends on how much the others have lost. So one model of the loss serves every budget: its
curvatures are measured once, every outcome at one budget teaches it for all, and the best allocation of a budget,
settled into the next one, is a better start than any rule. What is left for each budget is one expansion of the loss
where it is, knapsacks, and a race of their answers; between budgets, what the model draws there is measured as it is.
Budgets go from the loosest to the tightest and, in a further pass, back again. Budgets on several costs at once form a
grid. There are as many expansions as budgets, and they cost most: they are on the last fidelity but one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from allocator.core.budget import Budget, fits, spans
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
        points: Budgets on one cost; of grids over more, about as many.
        passes: How often all budgets are searched, from the loosest to the tightest and back in turn.
        entrants: Allocations that are raced at each.
        survivors: How many of these may be measured on all tokens.
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

    Where the dense model is not within ``within``, the loosest is that itself, and there is one more.

    Args:
        space: The search space.
        within: What all of them keep.
        objectives: The costs.
        points: How many there are; on several costs, about.
    """
    ranges, steps = spans(space, within, objectives), _steps(objectives, points)
    found = []
    for down in sorted(itertools.product(range(steps), repeat=len(objectives)), key=lambda each: (sum(each), each)):
        limits = {
            cost: high - (high - low) * step // steps
            for step, (cost, (low, high)) in zip(down, ranges.items(), strict=True)
        }
        budget = Budget(**{**within.limits, **limits})
        if not fits(space, space.dense, budget):  # else there is nothing to search
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
            for sign, (cost, (low, high)) in zip(signs, spans(space, within, objectives).items(), strict=True)
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
