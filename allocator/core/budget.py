"""Keeping an allocation exactly within a budget, and never below what the budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from allocator.core.errors import UserError
from allocator.core.space import Allocation, Cost, SearchSpace


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper bound on one exact cost of the whole model."""

    limit: int
    cost: Cost = "params"


def budget_for(space: SearchSpace, target: float) -> Budget:
    """Return the budget that removes the share ``target`` of the parameters inside units.

    Raises:
        UserError: ``target`` is not in (0, 1), or no allocation of the ladders reaches it.
    """
    if not 0.0 < target < 1.0:
        raise UserError(
            f"target: expected a share in (0, 1), found {target}. 0.5 removes half of the units' parameters"
        )
    budget = Budget(space.limit_for(target))
    if space.cost(space.sparsest) > budget.limit:
        raise UserError(
            f"target: {target} is out of reach of the ladders, which remove 0 to "
            f"{space.sparsity(space.sparsest):.4f} of the parameters in units. "
            "Ask for less, or give the ladders sparser levels"
        )
    return budget


def fits(space: SearchSpace, allocation: Sequence[int], budget: Budget) -> bool:
    """Whether the allocation is within the budget."""
    return space.cost(allocation, budget.cost) <= budget.limit


def denser_moves(space: SearchSpace, allocation: Sequence[int], budget: Budget) -> list[int]:
    """Return the units that could go one level denser and still fit; empty for a full budget."""
    room = budget.limit - space.cost(allocation, budget.cost)
    moves = []
    for index, (unit, level) in enumerate(zip(space.units, allocation, strict=True)):
        ladder = unit.costs(budget.cost)
        if level > 0 and ladder[level - 1] - ladder[level] <= room:
            moves.append(index)
    return moves


def repair(
    space: SearchSpace, allocation: Sequence[int], budget: Budget, order: Sequence[int], spared: Sequence[int] = ()
) -> Allocation:
    """Move an allocation into the budget, then fill the budget.

    Units go one level sparser, round after round in ``order``, until the budget holds; then units go one
    level denser in ``order`` while they fit, until none can. Only costs are looked at, so unequal steps
    are exact.

    Args:
        space: The search space.
        allocation: Any levels, within the ladders.
        budget: What must hold.
        order: Unit indices: who gives first, and who receives first.
        spared: The other unit indices, if any: they move only when those in ``order`` no longer can.
    """
    assert sorted([*order, *spared]) == list(range(len(space.units)))
    levels = list(allocation)
    ladders = [unit.costs(budget.cost) for unit in space.units]
    room = budget.limit - space.cost(levels, budget.cost)
    for group in (order, spared):
        while room < 0 and (movable := [i for i in group if levels[i] + 1 < len(ladders[i])]):
            for i in movable:
                room += ladders[i][levels[i]] - ladders[i][levels[i] + 1]
                levels[i] += 1
                if room >= 0:
                    break
    assert room >= 0, "the budget was checked to be reachable"
    for group in (order, spared):
        moved = True
        while moved:
            moved = False
            for i in group:
                if levels[i] > 0 and (step := ladders[i][levels[i] - 1] - ladders[i][levels[i]]) <= room:
                    levels[i] -= 1
                    room -= step
                    moved = True
    return tuple(levels)
