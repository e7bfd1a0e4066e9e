"""The baselines: uniform, and one rate for attention with one for the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from allocator.core.budget import Budget, fits, repair
from allocator.core.errors import UserError
from allocator.core.space import Allocation, SearchSpace, Unit
from allocator.searchers.rules.apportion import apportion

_TOLERANCE = 1e-9


def _level_at_most(unit: Unit, sparsity: float) -> int:
    """Return the sparsest level that removes no more than ``sparsity``; the dense level if there is no other."""
    return max(level for level in range(unit.num_levels) if level == 0 or unit.sparsity(level) <= sparsity + _TOLERANCE)


def uniform(space: SearchSpace, budget: Budget) -> Allocation:
    """Give every unit the sparsity that meets the budget, and the levels nearest to it by largest remainders."""
    return apportion(space, budget, lambda sparsity: np.full(len(space.units), sparsity), 0.0, 1.0)


def two_rate(space: SearchSpace, budget: Budget) -> list[Allocation]:
    """Return the sweep of two-rate allocations: one sparsity for attention, another for the rest.

    Attention gets each sparsity of its ladders in turn. The rest gets the least common sparsity that meets the budget,
    and is then repaired alone, so attention keeps its rate if possible. The best of the sweep by measurement is the
    baseline that a clever person would try.

    Raises:
        UserError: The space has no attention units, or no other units.
    """
    attention = [i for i, unit in enumerate(space.units) if unit.part == "attention"]
    others = [i for i, unit in enumerate(space.units) if unit.part != "attention"]
    if not attention or not others:
        raise UserError("the two-rate baseline needs units of attention and others in the search space")
    sweep: dict[Allocation, None] = {}
    for rate in _rates(space, attention):
        levels = list(space.sparsest)
        for i in attention:
            levels[i] = _level_at_most(space.units[i], rate)
        if not fits(space, levels, budget):
            continue
        _densest_common(space, levels, others, lambda candidate: fits(space, candidate, budget))
        sweep[repair(space, levels, budget, others, attention)] = None
    return list(sweep)


def _rates(space: SearchSpace, units: list[int]) -> list[float]:
    return sorted({round(space.units[i].sparsity(lv), 9) for i in units for lv in range(space.units[i].num_levels)})


def _densest_common(
    space: SearchSpace, levels: list[int], units: list[int], allowed: Callable[[list[int]], bool]
) -> None:
    """Set ``units`` in place to the smallest common sparsity that is allowed."""
    for rate in _rates(space, units):
        for i in units:
            levels[i] = _level_at_most(space.units[i], rate)
        if allowed(levels):
            return
    for i in units:
        levels[i] = space.units[i].num_levels - 1
