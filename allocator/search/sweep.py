"""One profile, every budget: a whole front from a chain of searches that go on from each other.

What a unit loses hardly depends on how much the others have lost. So one model of the loss serves every budget: its
curvatures are measured once, every outcome at one budget teaches it for all, and the best allocation of a budget,
settled into the next one, is a better start than any rule. What is left for each budget is one expansion of the loss
where it is, knapsacks, and a race of their answers. Budgets go from the loosest to the tightest and, in a further pass,
back again. Budgets on several costs at once form a grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.core.budget import Budget, fits
from allocator.core.errors import UserError
from allocator.core.space import Allocation, Cost, SearchSpace
from allocator.search.guided import GuidedSettings, propose
from allocator.search.race import race
from allocator.search.script import Memory, Script
from allocator.search.trust_region import probe


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """Settings of a sweep of budgets.

    Attributes:
        points: Budgets on one cost; of grids over more, about as many.
        passes: How often all budgets are searched, from the loosest to the tightest and back in turn.
        entrants: Allocations that are raced at each.
        survivors: How many of these may be measured on all tokens.
    """

    points: int = 12
    passes: int = 1
    entrants: int = 8
    survivors: int = 2

    def __post_init__(self) -> None:
        if min(self.points, self.passes, self.entrants, self.survivors) < 1:
            raise UserError("search.sweep: every setting must be at least 1")


def budgets(space: SearchSpace, within: Budget, objectives: Sequence[Cost], points: int) -> list[Budget]:
    """Return budgets that span the front of some costs, evenly, from the loosest to the tightest.

    Where the dense model is not within ``within``, the loosest is that itself, and there is one more.

    Args:
        space: The search space.
        within: What all of them keep.
        objectives: The costs.
        points: How many there are; on several costs, about.
    """
    steps = max(1, round((points + 1) ** (1 / len(objectives))) - 1)
    spans = {}
    for cost in objectives:
        low, dense = space.cost(space.sparsest, cost), space.cost(space.dense, cost)
        spans[cost] = low, min(dense, within.limits.get(cost, dense))
    found = []
    for down in sorted(itertools.product(range(steps + 1), repeat=len(objectives)), key=lambda each: (sum(each), each)):
        limits = {
            cost: high - (high - low) * step // (steps + 1)
            for step, (cost, (low, high)) in zip(down, spans.items(), strict=True)
        }
        budget = Budget(**{**within.limits, **limits})
        if not fits(space, space.dense, budget):  # else there is nothing to search
            found.append(budget)
    return found or [within]


def sweep(
    memory: Memory, start: Sequence[Allocation], limits: Sequence[Budget], settings: SweepSettings, seed: int
) -> Script:
    """Search within one budget after the other, beginning at ``start``. See the module's text."""
    yield from memory.measure(start, memory.tokens[-1])
    guided = GuidedSettings(entrants=settings.entrants, survivors=settings.survivors)
    for number in range(settings.passes):
        moved = False
        for place, budget in enumerate(limits if number % 2 == 0 else limits[::-1]):
            yield from memory.move(budget)
            yield from memory.expand()
            if not memory.gradients:
                yield from probe(memory, memory.tokens[0], len(memory.centre))
            rng = np.random.default_rng([seed, number, place])
            yield from race(memory, propose(memory, guided, rng), settings.survivors)
            moved = memory.advance() or moved
        if not moved:
            return f"nothing better within any of {len(limits)} budgets"
    return f"all {settings.passes} passes over {len(limits)} budgets are done"
