"""Budgets, and allocations that are exactly within one and as dense as it allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from allocator.core.costs import Bound, format_cost
from allocator.core.errors import UserError
from allocator.core.space import Allocation, Cost, SearchSpace

_NAMED = 3
"""Most units that a message names."""


@dataclass(frozen=True, slots=True, init=False)
class Budget:
    """Upper bounds on exact costs of the whole model, one or several: ``Budget(params=1000, kv_bytes=500)``."""

    limits: Mapping[Cost, int]

    def __init__(self, **limits: int) -> None:
        assert limits, "something must be bounded"
        object.__setattr__(self, "limits", limits)


def budget_for(space: SearchSpace, target: float | None, bounds: Iterable[Bound] = ()) -> Budget:
    """Return the budget that removes the share ``target`` of the parameters inside units and keeps the bounds.

    Without a target and bounds, the limit is the cost of the dense model.

    Raises:
        UserError: ``target`` is not in (0, 1), or no allocation keeps the budget. The message names each cost whose
            bound is too low, the range that the ladders reach, and the units that hold most of the cost then.
    """
    limits: dict[Cost, int] = {}
    if target is not None:
        if not 0.0 < target < 1.0:
            raise UserError(
                f"target: expected a share in (0, 1), found {target}. 0.5 removes half of the units' parameters"
            )
        limits["params"] = space.limit_for(target)
        if space.cost(space.sparsest) > limits["params"]:
            raise UserError(
                f"target: {target} is out of reach of the ladders, which remove 0 to "
                f"{space.sparsity(space.sparsest):.4f} of the parameters in units{_holders(space, 'params')}. "
                "Ask for less, or give the ladders sparser levels"
            )
    for bound in bounds:
        limit = bound.limit(space)
        dense = space.cost(space.dense, bound.name)  # a larger limit bounds nothing, and may exceed an int64
        limits[bound.name] = min(limit, limits.get(bound.name, dense), dense)
    missed = [cost for cost, limit in limits.items() if space.cost(space.sparsest, cost) > limit]
    if missed:
        reach = "; ".join(
            f"{cost} <= {format_cost(cost, limits[cost])} is out of reach of the ladders, which span "
            f"{format_cost(cost, space.cost(space.sparsest, cost))} to "
            f"{format_cost(cost, space.cost(space.dense, cost))}"
            f"{_holders(space, cost)}"
            for cost in missed
        )
        raise UserError(f"constraints: {reach}. Allow more, or give the ladders sparser levels")
    return Budget(**limits) if limits else Budget(params=space.cost(space.dense))


def _holders(space: SearchSpace, cost: Cost) -> str:
    """Return in words which units hold most of a cost at the sparsest levels."""
    last = {unit.name: unit.costs(cost)[-1] for unit in space.units}
    held = {"what no unit holds": space.fixed[cost], **last}
    most = sorted((name for name in held if held[name]), key=lambda name: -held[name])
    named = ", ".join(f"{name} {format_cost(cost, held[name])}" for name in most[:_NAMED])
    more = f", and {len(most) - _NAMED} more units" if len(most) > _NAMED else ""
    return f" (held by {named}{more})" if most else ""


def fits(space: SearchSpace, allocation: Sequence[int], budget: Budget) -> bool:
    """Whether the allocation is within the budget."""
    return all(space.cost(allocation, cost) <= limit for cost, limit in budget.limits.items())


def find_ranges(space: SearchSpace, budget: Budget, costs: Iterable[Cost]) -> dict[Cost, tuple[int, int]]:
    """Return for every cost its least value, and its largest value within the budget."""
    ranges = {}
    for cost in costs:
        low, dense = space.cost(space.sparsest, cost), space.cost(space.dense, cost)
        ranges[cost] = low, min(dense, budget.limits.get(cost, dense))
    return ranges


def denser_moves(space: SearchSpace, allocation: Sequence[int], budget: Budget) -> list[int]:
    """Return the units that could be one level denser within the budget; empty for a full budget."""
    ledger = _Ledger(space, allocation, budget)
    return [index for index in range(len(space.units)) if ledger.can_densify(index)]


def repair(
    space: SearchSpace, allocation: Sequence[int], budget: Budget, order: Sequence[int], spared: Sequence[int] = ()
) -> Allocation:
    """Move an allocation into the budget, then fill the budget.

    Units become sparser in turn, by one level each, in ``order``, until the budget holds. Then they become denser in
    the same way, until no unit could be one level denser. Costs are exact, and steps may have unequal costs. No cost
    rises with sparsity, so any budget that the sparsest allocation keeps can be met.

    Args:
        space: The search space.
        allocation: Any levels, within the ladders.
        budget: The limits to keep.
        order: Unit indices, in the order in which units become sparser and then denser.
        spared: The other unit indices, if any. They move only when no unit in ``order`` can move.
    """
    assert sorted([*order, *spared]) == list(range(len(space.units)))
    ledger = _Ledger(space, allocation, budget)
    ledger.trim(order, spared)
    for group in (order, spared):
        moved = True
        while moved:
            moved = False
            for i in group:
                if ledger.can_densify(i):
                    ledger.move(i, -1)
                    moved = True
    return tuple(ledger.levels)


def trim(space: SearchSpace, allocation: Sequence[int], budget: Budget, order: Sequence[int]) -> Allocation:
    """Move an allocation into the budget as :func:`repair` does, without filling the budget."""
    ledger = _Ledger(space, allocation, budget)
    ledger.trim(order)
    return tuple(ledger.levels)


class _Ledger:
    """Levels that move one at a time, and the room that each limit leaves."""

    def __init__(self, space: SearchSpace, allocation: Sequence[int], budget: Budget) -> None:
        self.levels = list(allocation)
        self._ladders = [tuple(unit.costs(cost) for unit in space.units) for cost in budget.limits]
        self._rooms = [limit - space.cost(allocation, cost) for cost, limit in budget.limits.items()]

    @property
    def short(self) -> bool:
        """Whether a limit is exceeded."""
        return min(self._rooms) < 0

    def trim(self, *groups: Sequence[int]) -> None:
        """Make units sparser, round after round, until the limits hold; a group moves once no earlier group can."""
        for group in groups:
            while self.short and (movable := [i for i in group if self.can_sparsify(i)]):
                for i in movable:
                    self.move(i, 1)
                    if not self.short:
                        break
        assert not self.short, "the budget was checked to be reachable"

    def can_sparsify(self, unit: int) -> bool:
        """Whether a unit has a sparser level."""
        return self.levels[unit] + 1 < len(self._ladders[0][unit])

    def can_densify(self, unit: int) -> bool:
        """Whether a unit has a denser level that the limits allow."""
        level = self.levels[unit]
        if level == 0:
            return False
        for ladders, room in zip(self._ladders, self._rooms, strict=True):
            ladder = ladders[unit]
            if ladder[level - 1] - ladder[level] > room:
                return False
        return True

    def move(self, unit: int, by: int) -> None:
        """Move a unit by a number of levels."""
        level = self.levels[unit]
        for index, ladders in enumerate(self._ladders):
            self._rooms[index] += ladders[unit][level] - ladders[unit][level + by]
        self.levels[unit] += by
