"""Allocations from at most 16 numbers: how much each kind of unit keeps, as a smooth curve over depth.

With d in (0, 1) the depth of the middle of its block, unit u keeps the share

    keep(u) = offset + span * (c_role(u) + sum_k c_part(u),k * cos(pi k d) / k)

where the first role has no constant, because the offset stands for it. The offset is not free: it is the one that meets
the budget exactly if levels were continuous, with costs interpolated between levels. Then each unit takes the next
sparser level, and units are made one level denser until none fits, in the order of how much they lost by that (largest
remainders). So every such allocation keeps and fills the budget, and coefficients of zero are uniform to within a
level.

This cannot express one block unlike its neighbours (curves have at most seven half-waves over depth), differences
between units of one role at one depth, or, with many roles, a curve for each (the roles of a part share its curve). A
search that needs these continues with moves of single units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from allocator.core.budget import Budget, repair
from allocator.core.space import Allocation, SearchSpace, Unit

MAX_COEFFICIENTS = 16
_MAX_ROLES = 8
_BISECTIONS = 60


class Shapes:
    """The map from coefficients in [-1, 1] to allocations of one space, within any budget.

    Attributes:
        names: Names of the coefficients: the role of a constant, or the part and number of half-waves of a curve.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        basis = _basis(space)
        self.names = list(basis)
        self._basis_uc = np.array(list(basis.values())).reshape(len(basis), len(space.units)).T
        # ladders from sparse to dense, that of unit u between 2u and 2u + 1, so that one interpolation serves all
        self._begin_u = 2.0 * np.arange(len(space.units))
        self._least_u = np.array([unit.kept[-1] / unit.total for unit in space.units])
        self._kept = _join(2.0 * index + np.array(unit.kept) / unit.total for index, unit in enumerate(space.units))
        self._levels = _join(np.arange(unit.num_levels) for unit in space.units)
        self._costs = {cost: _join(np.array(u.costs(cost), dtype=float) for u in space.units) for cost in space.fixed}

    def allocation(self, coefficients: Sequence[float], budget: Budget) -> Allocation:
        """Return the allocation of some coefficients: within the budget, and no unit could be one level denser."""
        assert len(coefficients) == len(self.names)
        preference_u = self._span(budget) * (self._basis_uc @ np.array(coefficients, dtype=float))
        level_u = self._interpolate(self._levels, preference_u + self._offset(preference_u, budget))
        sparser_u = np.ceil(level_u).astype(int)
        lost_u = np.round(sparser_u - level_u, 9)  # ties are resolved in model order
        return repair(self._space, sparser_u.tolist(), budget, np.argsort(-lost_u, kind="stable").tolist())

    def nearest(self, allocation: Allocation, budget: Budget) -> list[float]:
        """Return the coefficients in [-1, 1] whose kept shares are nearest to an allocation's, by least squares."""
        kept_u = [unit.kept[level] / unit.total for unit, level in zip(self._space.units, allocation, strict=True)]
        basis = np.column_stack([np.ones(len(kept_u)), self._span(budget) * self._basis_uc])
        solution = np.linalg.lstsq(basis, np.array(kept_u), rcond=None)[0]
        return [float(value) for value in np.clip(np.round(solution[1:], 9), -1.0, 1.0)]

    def _span(self, budget: Budget) -> float:
        """Return how far curves may deviate from uniform."""
        even = self._offset(np.zeros(len(self._space.units)), budget)
        return min(even, 1.0 - even)

    def _offset(self, preference_u: np.ndarray, budget: Budget) -> float:
        """Return the largest offset, to rounding, at which interpolated costs are within the budget."""
        rooms = {cost: limit - self._space.fixed[cost] for cost, limit in budget.limits.items()}
        low, high = -1.0 - float(preference_u.max()), 1.0 - float(preference_u.min())
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            keep_u = preference_u + middle
            fits = all(self._interpolate(self._costs[cost], keep_u).sum() <= room for cost, room in rooms.items())
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _interpolate(self, ladders: np.ndarray, keep_u: np.ndarray) -> np.ndarray:
        """Interpolate a figure of levels at the share that each unit keeps, [units]."""
        along_u: np.ndarray = np.interp(np.clip(keep_u, self._least_u, 1.0) + self._begin_u, self._kept, ladders)
        return along_u


def _join(ladders: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate ladders, each from sparse to dense."""
    return np.concatenate([ladder[::-1] for ladder in ladders])


def _basis(space: SearchSpace) -> dict[str, np.ndarray]:
    """Return what each coefficient adds to each unit, [units], constants first, then curves of more half-waves."""
    roles = list(dict.fromkeys(_role(unit) for unit in space.units))
    if len(roles) > _MAX_ROLES:
        role_of = [unit.part for unit in space.units]
    else:
        role_of = [_role(unit) for unit in space.units]
    roles, parts = list(dict.fromkeys(role_of)), list(dict.fromkeys(unit.part for unit in space.units))
    basis = {role: np.array([float(role == own) for own in role_of]) for role in roles[1:]}
    blocks = np.array([unit.block for unit in space.units])
    depth_u = (blocks + 0.5) / (blocks.max() + 1)
    inside = {part: np.array([unit.part == part for unit in space.units]) for part in parts}
    for waves in range(1, len(set(blocks.tolist()))):
        for part in parts:
            if waves < len(set(blocks[inside[part]].tolist())):
                basis[f"{part}/{waves}"] = inside[part] * np.cos(np.pi * waves * depth_u) / waves
    return dict(list(basis.items())[:MAX_COEFFICIENTS])


def _role(unit: Unit) -> str:
    """Return the name that like units of different blocks share: the last word of a matrix's name, else the part."""
    if unit.kind != "matrix":
        return unit.part
    return next(word for word in reversed(unit.name.split(".")) if not word.isdigit())
