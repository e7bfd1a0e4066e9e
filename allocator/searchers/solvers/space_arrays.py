"""A search space as arrays, for searchers that process many allocations at once.

Shapes: K limited costs, U units, L levels of the longest ladder, N allocations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from allocator.core.budget import Budget
from allocator.core.space import Allocation, SearchSpace

_LAST = 1e300
"""The rate of a step that frees nothing."""

_NOTHING = 1e-18
"""The cost that is assumed for a step that costs nothing, so that losses can be divided by it."""


class SpaceArrays:
    """Costs of all levels for one budget, and repair of allocations by a table of estimated losses.

    Attributes:
        cost_kul: Cost of each level, int64. Beyond a unit's last level, that level is repeated.
        price_ul: Cost of each level as a share of the room that the budget leaves, summed over the limited costs.
        sparsity_ul: Share of the unit that each level removes, padded likewise.
        last_u: Each unit's last level.
        room_k: What the budget leaves to units: the limit less the fixed cost.
    """

    def __init__(self, space: SearchSpace, budget: Budget) -> None:
        longest = max(unit.num_levels for unit in space.units)

        def padded(rows: Iterable[Sequence[float]]) -> list[list[float]]:
            return [[*row, *[row[-1]] * (longest - len(row))] for row in rows]

        costs = [padded(unit.costs(cost) for unit in space.units) for cost in budget.limits]
        self.cost_kul = np.array(costs, dtype=np.int64)
        self.room_k = np.array([limit - space.fixed[cost] for cost, limit in budget.limits.items()])
        self.price_ul = np.tensordot(1.0 / np.maximum(self.room_k, 1), self.cost_kul, axes=1)
        self.last_u = np.array([unit.num_levels - 1 for unit in space.units])
        self.sparsity_ul = np.array(
            padded([unit.sparsity(level) for level in range(unit.num_levels)] for unit in space.units)
        )
        self._units = np.arange(len(space.units))

    def measure_excess(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return by which share allocations [..., U] exceed each limit, summed over limits, [...]."""
        over_nk = self._cost(levels_nu) - self.room_k
        return np.asarray((np.maximum(over_nk, 0) / np.maximum(self.room_k, 1)).sum(-1))

    def look_up(self, table_ul: np.ndarray, levels_nu: np.ndarray) -> np.ndarray:
        """Return the sum of a table's entries for allocations [..., U], [...]."""
        return np.asarray(table_ul[self._units, levels_nu].sum(-1))

    def fills_budget(self, allocation: Allocation) -> bool:
        """Whether an allocation keeps the budget and no unit could be one level denser within it."""
        levels_u, units = np.array(allocation), self._units
        room_k = self.room_k - self._cost(levels_u)
        step_ku = self.cost_kul[:, units, np.maximum(levels_u - 1, 0)] - self.cost_kul[:, units, levels_u]
        fits_u = (step_ku <= room_k[:, None]).all(0)
        return bool((room_k >= 0).all()) and not bool(((levels_u > 0) & fits_u).any())

    def fit_to_budget(self, levels: Sequence[int] | np.ndarray, table_ul: np.ndarray) -> Allocation:
        """Move an allocation into the budget and fill the budget, one level at a time, by least loss per cost.

        Args:
            levels: One level per unit, within the ladders.
            table_ul: Estimated loss of every level.

        Returns:
            An allocation that keeps the budget and in which no unit could be one level denser.
        """
        levels_u, units = np.array(levels), self._units
        scale_k1 = np.maximum(self.room_k, 1)[:, None]
        room_k1 = (self.room_k - self._cost(levels_u))[:, None]
        while (room_k1 < 0).any():
            next_u = np.minimum(levels_u + 1, self.last_u)
            freed_ku = self.cost_kul[:, units, levels_u] - self.cost_kul[:, units, next_u]
            lost_u = table_ul[units, next_u] - table_ul[units, levels_u]
            can_u = levels_u < self.last_u
            assert can_u.any(), "the budget was checked to be reachable"
            # steps that free nothing come last; room freed beyond the need does not count
            useful_u = (np.minimum(freed_ku, np.maximum(-room_k1, 0)) / scale_k1).sum(0)
            rate_u = np.divide(lost_u, useful_u, out=np.full(len(units), _LAST), where=useful_u > 0)
            unit = int(np.where(can_u, rate_u, np.inf).argmin())
            levels_u[unit] += 1
            room_k1 = room_k1 + freed_ku[:, unit, None]
        while True:
            before_u = np.maximum(levels_u - 1, 0)
            needed_ku = self.cost_kul[:, units, before_u] - self.cost_kul[:, units, levels_u]
            can_u = (levels_u > 0) & (needed_ku <= room_k1).all(0)
            if not can_u.any():
                return tuple(levels_u.tolist())
            gain_u = table_ul[units, levels_u] - table_ul[units, before_u]
            rate_u = gain_u / np.maximum((needed_ku / scale_k1).sum(0), _NOTHING)
            unit = int(np.where(can_u, rate_u, -np.inf).argmax())
            levels_u[unit] -= 1
            room_k1 = room_k1 - needed_ku[:, unit, None]

    def _cost(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return the costs inside units, [..., K], of allocations [..., U]."""
        return np.asarray(np.moveaxis(self.cost_kul[:, self._units, levels_nu].sum(-1), 0, -1))
