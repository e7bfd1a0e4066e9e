"""From real-valued sparsities to an allocation: the step that the field's rules leave open, once for all of them.

A rule gives a curve: one sparsity for each unit as a function of one number, at which everything grows sparser or
everything denser. The member of the curve that meets the budget is taken, each unit clamped to what its ladder offers,
so that what clamping leaves over is borne by the others. Most published rules normalise once, by the plain mean over
layers, and clamp afterwards or never, so that with layers of unequal sizes they miss the target. Then sparsities become
levels by the method of largest remainders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from allocator.core.budget import Budget, repair
from allocator.core.space import Allocation, SearchSpace

Curve = Callable[[float], np.ndarray]
"""From one number to the sparsity of every unit, not decreasing in any of them; values beyond [0, 1] are clamped."""

_BISECTIONS = 100
_TOLERANCE = 1e-6
"""A sparsity that exceeds a level by less is at it: bisection has a last digit."""


def on_budget(space: SearchSpace, budget: Budget, curve: Curve, low: float, high: float) -> np.ndarray:
    """Return the sparsities [units] of the first member of a curve whose cost is within the budget.

    Costs between levels are interpolated. Where even the last member costs more, it is returned.

    Args:
        space: The search space.
        budget: What is to be met.
        curve: Sparsities as a function of one number.
        low: Where it is densest.
        high: Where it is sparsest.
    """
    places = [_sparsities(space, index) for index in range(len(space.units))]
    most = np.array([sparsities[-1] for sparsities in places])
    rooms = {cost: limit - space.fixed[cost] for cost, limit in budget.limits.items()}
    ladders = {cost: [unit.costs(cost) for unit in space.units] for cost in rooms}

    def member(x: float) -> np.ndarray:
        return np.clip(curve(x), 0.0, most)

    def keeps(x: float) -> bool:
        spent = {cost: sum(map(np.interp, member(x), places, ladders[cost])) for cost in rooms}
        return all(spent[cost] <= rooms[cost] for cost in rooms)

    if keeps(low):
        return member(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if keeps(middle):
            high = middle
        else:
            low = middle
    return member(high)


def to_levels(space: SearchSpace, budget: Budget, sparsities: Sequence[float] | np.ndarray) -> Allocation:
    """Return the allocation at the budget that is nearest to real-valued sparsities, by largest remainders.

    Every unit takes the next level that is at least as sparse. Then units go a level denser while the budget
    allows, first those that the first step moved furthest, as a share of the step between levels.
    """
    levels, excess = [], []
    for index, sparsity in enumerate(sparsities):
        ladder = _sparsities(space, index)
        level = min(int(np.searchsorted(ladder, sparsity - _TOLERANCE)), len(ladder) - 1)
        step = ladder[level] - ladder[level - 1] if level else 1.0
        levels.append(level)
        excess.append((ladder[level] - sparsity) / step)
    order = np.argsort(-np.array(excess), kind="stable")
    return repair(space, levels, budget, order.tolist())


def apportioned(space: SearchSpace, budget: Budget, curve: Curve, low: float, high: float) -> Allocation:
    """Return the allocation of a curve's member at the budget. See :func:`on_budget` and :func:`to_levels`."""
    return to_levels(space, budget, on_budget(space, budget, curve, low, high))


def refilled(space: SearchSpace, levels: Sequence[int], budget: Budget, last: Collection[int]) -> Allocation:
    """Return levels within the budget with it filled: by the units that were sparsified last, if they can."""
    return repair(space, levels, budget, [*last], [i for i in range(len(levels)) if i not in last])


def _sparsities(space: SearchSpace, index: int) -> list[float]:
    unit = space.units[index]
    return [unit.sparsity(level) for level in range(unit.num_levels)]
