"""From real-valued sparsities to an allocation: the step that the field's rules leave open.

A rule gives a curve: the sparsity of each unit as a monotone function of one number. The member of the curve that meets
the budget is taken, with each unit clamped to its ladder, so the other units compensate for clamped ones. Most
published rules normalise once, by the plain mean over layers, and clamp afterwards or never, so they miss the target if
layers have unequal sizes. Then sparsities become levels by the method of largest remainders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from allocator.core.budget import Budget, repair
from allocator.core.space import Allocation, SearchSpace

Curve = Callable[[float], np.ndarray]
"""Maps a number to the sparsity of every unit, none of which decreases. Values outside [0, 1] are clamped."""

_BISECTIONS = 100
_TOLERANCE = 1e-6
"""A sparsity that exceeds a level by less is at the level, because bisection is not exact."""


def meet_budget(space: SearchSpace, budget: Budget, curve: Curve, low: float, high: float) -> np.ndarray:
    """Return the sparsities [units] of the first member of a curve whose cost is within the budget.

    Costs between levels are interpolated. If even the last member costs more, it is returned.

    Args:
        space: The search space.
        budget: The limits to meet.
        curve: Sparsities as a function of one number.
        low: The number of the densest member.
        high: The number of the sparsest member.
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


def round_to_levels(space: SearchSpace, budget: Budget, sparsities: Sequence[float] | np.ndarray) -> Allocation:
    """Return the allocation at the budget that is nearest to real-valued sparsities, by largest remainders.

    Every unit takes the next level that is at least as sparse. Then units are made one level denser while the budget
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


def apportion(space: SearchSpace, budget: Budget, curve: Curve, low: float, high: float) -> Allocation:
    """Return the allocation of a curve's member at the budget. See :func:`meet_budget` and :func:`round_to_levels`."""
    return round_to_levels(space, budget, meet_budget(space, budget, curve, low, high))


def refill(space: SearchSpace, levels: Sequence[int], budget: Budget, last: Collection[int]) -> Allocation:
    """Fill the budget of an allocation within it, first with the units that were sparsified last."""
    return repair(space, levels, budget, [*last], [i for i in range(len(levels)) if i not in last])


def _sparsities(space: SearchSpace, index: int) -> list[float]:
    unit = space.units[index]
    return [unit.sparsity(level) for level in range(unit.num_levels)]
