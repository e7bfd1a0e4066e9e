"""A search space as arrays, for searchers that look at many allocations at once.

Shapes: U units, L levels of the longest ladder, N allocations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.core.budget import Budget
from allocator.core.space import Allocation, SearchSpace


class Ladders:
    """Costs of all levels within one budget, and repair of allocations by what a table says they lose.

    Attributes:
        cost_ul: What each level costs, int64; beyond a unit's last level, that level again.
        sparsity_ul: Share of the unit that each level removes, likewise.
        last_u: Each unit's last level.
        room: The budget, less what no unit holds.
    """

    def __init__(self, space: SearchSpace, budget: Budget) -> None:
        longest = max(unit.num_levels for unit in space.units)
        costs = [unit.costs(budget.cost) for unit in space.units]
        self.cost_ul = np.array([[*c, *[c[-1]] * (longest - len(c))] for c in costs], dtype=np.int64)
        self.last_u = np.array([unit.num_levels - 1 for unit in space.units])
        self.sparsity_ul = np.array(
            [[unit.sparsity(min(level, unit.num_levels - 1)) for level in range(longest)] for unit in space.units]
        )
        self.room = budget.limit - space.fixed[budget.cost]
        self._units = np.arange(len(space.units))

    def cost(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return the cost inside units of allocations [..., U]."""
        return np.asarray(self.cost_ul[self._units, levels_nu].sum(-1))

    def look_up(self, table_ul: np.ndarray, levels_nu: np.ndarray) -> np.ndarray:
        """Return the sum of a table's entries for allocations [..., U]."""
        return np.asarray(table_ul[self._units, levels_nu].sum(-1))

    def filled(self, allocation: Allocation) -> bool:
        """Whether an allocation keeps the budget, and no unit could go one level denser and still keep it."""
        levels_u, units = np.array(allocation), self._units
        room = self.room - int(self.cost(levels_u))
        step_u = self.cost_ul[units, np.maximum(levels_u - 1, 0)] - self.cost_ul[units, levels_u]
        return room >= 0 and not bool(((levels_u > 0) & (step_u <= room)).any())

    def settle(self, levels: Sequence[int] | np.ndarray, table_ul: np.ndarray) -> Allocation:
        """Move an allocation into the budget and fill the budget, one level at a time, by least loss per cost.

        Args:
            levels: One level per unit, within the ladders.
            table_ul: Estimated loss of every level.

        Returns:
            An allocation that keeps the budget, and in which no unit could go one level denser and still keep it.
        """
        levels_u, units = np.array(levels), self._units
        room = self.room - int(self.cost(levels_u))
        while room < 0:
            next_u = np.minimum(levels_u + 1, self.last_u)
            freed_u = self.cost_ul[units, levels_u] - self.cost_ul[units, next_u]
            lost_u = table_ul[units, next_u] - table_ul[units, levels_u]
            can_u = levels_u < self.last_u
            assert can_u.any(), "the budget was checked to be reachable"
            # steps that free nothing come last; beyond what is needed, freed room counts for nothing
            useful_u = np.clip(freed_u, 1e-9, -room)
            unit = int(np.where(can_u, lost_u / useful_u, np.inf).argmin())
            levels_u[unit] += 1
            room += int(freed_u[unit])
        while True:
            before_u = np.maximum(levels_u - 1, 0)
            needed_u = self.cost_ul[units, before_u] - self.cost_ul[units, levels_u]
            can_u = (levels_u > 0) & (needed_u <= room)
            if not can_u.any():
                return tuple(levels_u.tolist())
            gain_u = table_ul[units, levels_u] - table_ul[units, before_u]
            unit = int(np.where(can_u, gain_u / np.maximum(needed_u, 1e-9), -np.inf).argmax())
            levels_u[unit] -= 1
            room -= int(needed_u[unit])
