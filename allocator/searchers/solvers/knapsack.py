"""The multiple-choice knapsack: the best allocation when losses add up over units.

Every unit takes exactly one level. The sum of ``table[unit][level]`` is minimised under limits on exact integer costs.
Axes of arrays: k limited costs, u units, l levels, b buckets of cost, p points of a front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from allocator.core.budget import Budget
from allocator.core.errors import UserError
from allocator.core.space import Allocation, Cost, SearchSpace
from allocator.searchers.solvers.lagrange import Floats, Ints, fill, find_cheapest, find_optimum, mark_improvements
from allocator.searchers.solvers.space_arrays import SpaceArrays

Table: TypeAlias = Sequence[Sequence[float]]
"""What each level of each unit adds to the loss, in the order of the units. The value inf forbids a level."""

MAX_BUCKETS = 2**15
""":func:`additive_front` is exact if the costs of a space span at most this many steps."""


def knapsack(
    space: SearchSpace, budget: Budget, table: Table, allowed: Sequence[tuple[int, int]] | None = None
) -> Allocation:
    """Minimise the sum of ``table`` within a budget, exactly. See :func:`knapsack_multi`."""
    return knapsack_multi(space, budget.limits, table, allowed)


def knapsack_nearby(
    arrays: SpaceArrays, table_ul: Floats, centre: Allocation, radius: int, slack: float = 0.0
) -> Allocation:
    """Minimise the sum of a table within ``radius`` levels of ``centre`` in every unit.

    Works like :func:`knapsack_multi`, on arrays.

    Args:
        arrays: The space and its budget.
        table_ul: What each level of each unit adds to the loss. Entries beyond a unit's last level are ignored.
        centre: One level per unit, within the budget.
        radius: Levels that a unit may move.
        slack: How much larger than the minimum the sum may be. With hundreds of units, a little slack saves most of
            the work.
    """
    last_u1, unit_u1 = arrays.last_u[:, None], np.arange(len(centre))[:, None]
    level_uw = np.array(centre)[:, None] + np.arange(-radius, radius + 1)  # the window of each unit
    inside_uw = (level_uw >= 0) & (level_uw <= last_u1)
    level_uw = np.clip(level_uw, 0, last_u1)
    values_uw = np.where(inside_uw, table_ul[unit_u1, level_uw], np.inf)
    costs_kuw, rooms_k = arrays.cost_kul[:, unit_u1, level_uw], arrays.room_k
    found_u = find_optimum(values_uw, costs_kuw, rooms_k, slack)
    assert found_u is not None, "the centre keeps the budget"
    found_u = fill(values_uw, costs_kuw, rooms_k, found_u)
    levels_u = level_uw[unit_u1[:, 0], found_u]
    return tuple(fill(table_ul, arrays.cost_kul, rooms_k, levels_u).tolist())


def knapsack_multi(
    space: SearchSpace,
    limits: Mapping[Cost, int],
    table: Table,
    allowed: Sequence[tuple[int, int]] | None = None,
) -> Allocation:
    """Minimise the sum of ``table`` within a limit on each of several costs of the whole model.

    The answer is exact. With one limit, dynamic programming on Lagrangian bounds finds it without rounding any cost.
    With several limits, the mixed-integer solver HiGHS finds it to its tolerances. Beyond two sizes, the answer is only
    the best one found. :mod:`allocator.searchers.solvers.lagrange` states these sizes. The limits always hold, and
    equal inputs give equal allocations.

    Then the optimum is filled. While some unit can be one level denser within the limits, the unit that lowers the sum
    most becomes denser. If ``table`` falls with density, there is nothing to fill. If a denser level is worse, a
    full budget is preferred to a smaller sum. Units first move inside the ranges of ``allowed``. The fill leaves these
    ranges only to use room that is then left. It never takes a level whose value is inf.

    Args:
        space: The search space.
        limits: Upper bounds on costs of the whole model, by name.
        table: One row per unit, one value per level; inf forbids the level.
        allowed: The lowest and the highest level to choose from, per unit, both included. None allows all levels.

    Raises:
        UserError: A unit has no usable level, or no choice of levels keeps the limits.
    """
    values_ul, costs_kul = _pad(space, table, tuple(limits))
    rooms_k = np.array([limit - space.fixed[cost] for cost, limit in limits.items()])
    inside_ul = values_ul
    if allowed is not None:
        low_u, high_u = np.array(allowed, dtype=np.int64).T
        level_l = np.arange(values_ul.shape[1])
        inside_ul = np.where((level_l >= low_u[:, None]) & (level_l <= high_u[:, None]), values_ul, np.inf)
    reach = _check_reach(space, limits, inside_ul, costs_kul)
    found_u = find_optimum(inside_ul, costs_kul, rooms_k)
    if found_u is None:
        raise UserError(
            f"{_named(limits)}: no allocation was found that keeps all, though the levels to choose from "
            f"reach {reach} one by one. Raise a limit, or allow sparser levels"
        )
    for reach_ul in (inside_ul, values_ul):
        found_u = fill(reach_ul, costs_kul, rooms_k, found_u)
    return tuple(found_u.tolist())


def additive_front(space: SearchSpace, cost: Cost, table: Table) -> list[tuple[int, float, Allocation]]:
    """Return the Pareto front of one cost of the whole model and the sum of ``table``, cheapest first.

    The method is dynamic programming over buckets of cost. The steps of the ladders are divided by their greatest
    common divisor. If the space then spans at most :data:`MAX_BUCKETS` steps, the front is exact. Otherwise steps are
    rounded to that many buckets. Then cost and value of every point are still those of its allocation, and no point
    dominates another. But some points of the exact front may be missing, or have a slightly worse point in their place.

    Raises:
        UserError: A unit has no finite value.
    """
    values_ul, costs_kul = _pad(space, table, (cost,))
    _check_reach(space, {}, values_ul, costs_kul)
    usable_ul = np.isfinite(values_ul)
    above_ul = np.where(usable_ul, costs_kul[0] - find_cheapest(values_ul, costs_kul)[0, :, None], 0)
    above_ul //= max(int(np.gcd.reduce(above_ul, axis=None)), 1)
    span = int(above_ul.max(axis=1).sum())
    if span > MAX_BUCKETS:
        above_ul = np.rint(above_ul * (MAX_BUCKETS / span)).astype(np.int64)

    best_b = np.zeros(1)
    picks = []
    for value_l, step_l, usable_l in zip(values_ul, above_ul, usable_ul, strict=True):
        wider_b = np.full(len(best_b) + step_l.max(), np.inf)
        pick_b = np.zeros(len(wider_b), dtype=np.min_scalar_type(len(step_l)))
        for level in np.flatnonzero(usable_l).tolist():
            window = slice(step_l[level], step_l[level] + len(best_b))
            candidate_b = best_b + value_l[level]
            better_b = candidate_b < wider_b[window]
            np.copyto(wider_b[window], candidate_b, where=better_b)
            np.copyto(pick_b[window], level, where=better_b)
        best_b = wider_b
        picks.append(pick_b)

    bucket_p = np.flatnonzero(mark_improvements(best_b))
    levels_up = np.empty((len(picks), len(bucket_p)), dtype=np.int64)
    for index in reversed(range(len(picks))):
        levels_up[index] = picks[index][bucket_p]
        bucket_p = bucket_p - above_ul[index, levels_up[index]]
    unit_u1 = np.arange(len(picks))[:, None]
    cost_p = space.fixed[cost] + costs_kul[0, unit_u1, levels_up].sum(axis=0)
    value_p = values_ul[unit_u1, levels_up].sum(axis=0)
    order_p = np.lexsort((value_p, cost_p))  # rounded steps leave the points out of order
    order_p = order_p[mark_improvements(value_p[order_p])]
    levels_pu = levels_up.T[order_p].tolist()
    return list(zip(cost_p[order_p].tolist(), value_p[order_p].tolist(), map(tuple, levels_pu), strict=True))


def _pad(space: SearchSpace, table: Table, costs: Sequence[Cost]) -> tuple[Floats, Ints]:
    shape = len(space.units), max(unit.num_levels for unit in space.units)
    values_ul = np.full(shape, np.inf)
    costs_kul = np.zeros((len(costs), *shape), dtype=np.int64)
    for index, (unit, row) in enumerate(zip(space.units, table, strict=True)):
        assert len(row) == unit.num_levels, f"{unit.name}: {len(row)} values for {unit.num_levels} levels"
        values_ul[index, : len(row)] = row
        for k, cost in enumerate(costs):
            costs_kul[k, index, : len(row)] = unit.costs(cost)
    assert (values_ul > -np.inf).all(), "a value is -inf or not a number"
    return values_ul, costs_kul


def _check_reach(space: SearchSpace, limits: Mapping[Cost, int], values_ul: Floats, costs_kul: Ints) -> str:
    """Check that every limit is reachable, and return the reachable range of each limited cost in words."""
    for index in np.flatnonzero(~np.isfinite(values_ul).any(axis=1)):
        name = space.units[index].name
        raise UserError(f"{name}: no level is left to choose. Widen its range, or give a finite value")
    least_k = find_cheapest(values_ul, costs_kul).sum(axis=1)
    most_k = np.where(np.isfinite(values_ul), costs_kul, 0).max(axis=2).sum(axis=1)
    reach = ", ".join(
        f"{cost} {space.fixed[cost] + least} to {space.fixed[cost] + most}"
        for cost, least, most in zip(limits, least_k, most_k, strict=False)
    )
    missed = {
        cost: limit
        for (cost, limit), least in zip(limits.items(), least_k, strict=False)
        if limit < space.fixed[cost] + least
    }
    if missed:
        raise UserError(
            f"{_named(missed)}: out of reach of the levels to choose from, which reach {reach}. "
            "Raise the limit, or allow sparser levels"
        )
    return reach


def _named(limits: Mapping[Cost, int]) -> str:
    return " and ".join(f"{cost} <= {limit}" for cost, limit in limits.items())
