"""Multiple-choice knapsacks as arrays: Lagrangian bounds, then an exact search of the levels that they leave open.

Axes: k limited costs, u units, l levels, s states, x usable levels of all units in a row. Rows are padded to
the longest ladder; a forbidden level has the value inf. A room is what a limit leaves to the units.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import fsum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

MAX_STATES = 2**15
"""Most states that dynamic programming keeps per unit. If there are never more, the answer is exact."""

MAX_NODES = 1000
"""Most nodes of branch and bound under several limits. If it needs no more, the answer is exact to its tolerances."""

_ROUNDS = 64  # of the search for a multiplier; any multiplier gives a valid bound
_TOLERANCE = 1e-12  # of the sums behind a bound: nothing smaller is called an improvement


def find_optimum(values_ul: Floats, costs_kul: Ints, rooms_k: Ints, slack: float = 0.0) -> Ints | None:
    """Return the levels of least value within the rooms, to within a slack; None if none were found.

    Lagrangian multipliers give a lower bound and a feasible choice. If the two meet, the choice is the optimum.
    Otherwise every level that the bound excludes is dropped (Pisinger, "A minimal algorithm for the
    multiple-choice knapsack problem", EJOR 83, 1995) and the rest is searched.
    """
    single = len(rooms_k) == 1
    price_k = _multiplier(values_ul, costs_kul[0], int(rooms_k[0])) if single else None
    if price_k is None and (price_k := _multipliers(values_ul, costs_kul, rooms_k)) is None:
        return None
    priced_ul = values_ul + np.tensordot(price_k, costs_kul, axes=1)
    least_u = priced_ul.min(axis=1)
    excess_ul = priced_ul - least_u[:, None]
    levels_u = _feasible(values_ul, costs_kul, rooms_k, excess_ul)
    gap = np.inf
    if levels_u is not None:
        bound = fsum([*least_u.tolist(), *(-price_k * rooms_k).tolist()])
        rounding = _TOLERANCE * float(np.abs(least_u).sum() + price_k @ np.abs(rooms_k))
        gap = _total(values_ul, levels_u) - bound - rounding
        if gap <= slack:
            return levels_u
    if single:
        assert levels_u is not None, "with one room, the cheapest choice is feasible"
        return _states(values_ul, costs_kul[0], int(rooms_k[0]), excess_ul, levels_u, gap)
    better_u = _mixed_integer(np.where(excess_ul < gap, values_ul, np.inf), costs_kul, rooms_k, gap)
    found = [choice_u for choice_u in (levels_u, better_u) if choice_u is not None]
    return min(found, key=lambda choice_u: _total(values_ul, choice_u), default=None)


def _multiplier(values_ul: Floats, costs_ul: Ints, room: int) -> Floats:
    """Return the multiplier of one resource that maximises the Lagrangian bound, by secants."""
    rows_u, floats_ul = np.arange(len(values_ul)), costs_ul.astype(float)

    def point(level_u: Ints) -> tuple[int, float]:
        return int(costs_ul[rows_u, level_u].sum()), float(values_ul[rows_u, level_u].sum())

    def first(key_ul: Floats, tie_ul: Floats) -> tuple[int, float]:
        return point(np.where(key_ul == key_ul.min(axis=1, keepdims=True), tie_ul, np.inf).argmin(axis=1))

    rich = first(values_ul, floats_ul)
    if rich[0] <= room:
        return np.zeros(1)
    cheap = first(np.where(np.isfinite(values_ul), floats_ul, np.inf), values_ul)
    for _ in range(_ROUNDS):
        price = (cheap[1] - rich[1]) / (rich[0] - cheap[0])
        at = point((values_ul + price * floats_ul).argmin(axis=1))
        if at[1] + price * at[0] >= (rich[1] + price * rich[0]) - _TOLERANCE * abs(rich[1]):
            break
        cheap, rich = (at, rich) if at[0] <= room else (cheap, at)
    return np.array([price])


def _multipliers(values_ul: Floats, costs_kul: Ints, rooms_k: Ints) -> Floats | None:
    """Return the multipliers that maximise the Lagrangian bound; None if not even fractions of levels fit.

    They are the dual solution of the linear relaxation (Geoffrion, "Lagrangean relaxation for integer
    programming", 1974: the two bounds are equal, because the relaxed problem has integral optima).
    """
    from scipy.optimize import linprog

    column_x, choice_ux, rows_kx, step_k, limit_k = _program(values_ul, costs_kul, rooms_k)
    scale_k = np.maximum(limit_k, 1)
    solved = linprog(
        values_ul.flat[column_x],
        A_ub=rows_kx / scale_k[:, None],
        b_ub=limit_k / scale_k,
        A_eq=choice_ux,
        b_eq=np.ones(len(values_ul)),
        method="highs-ds",
    )
    if solved.status == 2:
        return None
    assert solved.status == 0, solved.message
    return np.asarray(np.maximum(-solved.ineqlin.marginals, 0.0) / (scale_k * step_k))


def _mixed_integer(values_ul: Floats, costs_kul: Ints, rooms_k: Ints, gap: float) -> Ints | None:
    """Return the levels of least value within the rooms, checked in integers; None if none were found."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    column_x, choice_ux, rows_kx, step_k, limit_k = _program(values_ul, costs_kul, rooms_k)
    value_x = values_ul.flat[column_x]
    scale = gap if np.isfinite(gap) else max(float(np.ptp(value_x)), np.finfo(float).tiny)
    while True:
        with _mute():
            solved = milp(
                value_x / scale,  # tolerances of the solver are absolute
                integrality=1,
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(choice_ux, 1, 1), LinearConstraint(rows_kx, -np.inf, limit_k)],
                options={"mip_rel_gap": 0.0, "node_limit": MAX_NODES},
            )
        if solved.x is None:
            return None
        weight_ul = np.zeros(values_ul.shape)
        weight_ul.flat[column_x] = solved.x
        levels_u: Ints = weight_ul.argmax(axis=1)
        over_k = costs_kul[:, np.arange(len(levels_u)), levels_u].sum(axis=1) - rooms_k
        if (over_k <= 0).all():
            return levels_u
        limit_k = limit_k - np.maximum(-(-over_k // step_k), 0)  # the solver's tolerance allowed an excess


@contextmanager
def _mute() -> Iterator[None]:
    """Silence C code on standard output, which holds a command's answer; HiGHS sometimes writes lines there."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _program(values_ul: Floats, costs_kul: Ints, rooms_k: Ints) -> tuple[Ints, Any, Ints, Ints, Ints]:
    """Return the integer program over the usable levels x.

    These are: the flat indices (x,); a sparse matrix of the unit of each (u, x); the cost above the unit's cheapest in
    steps (k, x); the size of a step, a greatest common divisor (k,); the rooms in steps (k,).
    """
    from scipy.sparse import csr_array

    unit_x, level_x = np.nonzero(np.isfinite(values_ul))
    least_ku = find_cheapest(values_ul, costs_kul)
    rows_kx = costs_kul[:, unit_x, level_x] - least_ku[:, unit_x]
    step_k = np.maximum(np.gcd.reduce(rows_kx, axis=1), 1)
    choice_ux = csr_array((np.ones(len(unit_x)), (unit_x, np.arange(len(unit_x)))))
    limit_k = (rooms_k - least_ku.sum(axis=1)) // step_k
    return unit_x * values_ul.shape[1] + level_x, choice_ux, rows_kx // step_k[:, None], step_k, limit_k


def _states(values_ul: Floats, costs_ul: Ints, room: int, excess_ul: Floats, incumbent_u: Ints, gap: float) -> Ints:
    """Return the levels of least value within one room, by dynamic programming over (cost, value) states.

    It begins at the bound, with every unit at its level without excess. Units are opened one after the other, those
    with the cheapest change first. Of all choices among open units, a state is kept if its excess is below the gap
    between incumbent and bound, if it can still fit, and if no other state dominates it; so there are never more states
    than distinct costs. Each state is completed with the bound's choice for the other units. A better one narrows the
    gap, until no unit is left whose change costs less. If more than :data:`MAX_STATES` states are left, those of least
    excess are kept, and the answer is the best of these. Tables that are linear in odd costs (subset sums) do that.
    """
    units = np.arange(len(values_ul))
    bound_u = np.where(excess_ul[units, incumbent_u] > 0, excess_ul.argmin(axis=1), incumbent_u)
    others_ul = excess_ul.copy()
    others_ul[units, bound_u] = np.inf
    least_u = others_ul.min(axis=1)
    open_u = np.flatnonzero(least_u < gap)
    open_u = open_u[least_u[open_u].argsort(kind="stable")]
    usable_ul = excess_ul[open_u] < gap
    spent_ul = costs_ul[open_u] - costs_ul[open_u, bound_u[open_u]][:, None]
    worth_ul = values_ul[open_u] - values_ul[open_u, bound_u[open_u]][:, None]
    freed_u = np.where(usable_ul, spent_ul, 0).min(axis=1)
    freed_u = freed_u[::-1].cumsum()[::-1] - freed_u  # the most that units opened later can free
    room -= int(costs_ul[units, bound_u].sum())
    best = _total(values_ul, incumbent_u) - _total(values_ul, bound_u)
    best_at: tuple[int, int] | None = None
    cost_s, value_s, excess_s = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[Ints, Ints]] = []
    for index, unit in enumerate(open_u.tolist()):
        if least_u[unit] >= gap:
            break
        level_l = np.flatnonzero(usable_ul[index])
        next_cost_s = (spent_ul[index, level_l, None] + cost_s).ravel()
        next_value_s = (worth_ul[index, level_l, None] + value_s).ravel()
        next_excess_s = (excess_ul[unit, level_l, None] + excess_s).ravel()
        order_s = np.flatnonzero((next_cost_s <= room - freed_u[index]) & (next_excess_s < gap))
        order_s = order_s[next_cost_s[order_s].argsort(kind="stable")]  # merges the runs of the levels
        order_s = order_s[mark_improvements(next_value_s[order_s])]
        order_s = order_s[np.diff(next_cost_s[order_s], append=room - freed_u[index] + 1) > 0]
        if len(order_s) > MAX_STATES:
            kept_s = next_excess_s[order_s].argpartition(MAX_STATES)[:MAX_STATES]
            order_s = order_s[np.sort(kept_s)]
        steps.append((level_l[order_s // len(cost_s)], order_s % len(cost_s)))
        cost_s, value_s, excess_s = next_cost_s[order_s], next_value_s[order_s], next_excess_s[order_s]
        # the states that fit come first, and the last of them has the least value
        state = int(np.searchsorted(cost_s, room, side="right")) - 1
        if state >= 0 and value_s[state] < best:
            gap, best, best_at = gap - (best - float(value_s[state])), float(value_s[state]), (index, state)
        if not len(cost_s):
            break
    if best_at is None:
        return incumbent_u
    levels_u = bound_u
    last, state = best_at
    for index in range(last, -1, -1):
        level_s, parent_s = steps[index]
        levels_u[open_u[index]], state = level_s[state], parent_s[state]
    return levels_u


def _feasible(values_ul: Floats, costs_kul: Ints, rooms_k: Ints, excess_ul: Floats) -> Ints | None:
    """Round the Lagrangian solution into the rooms, then improve it unit by unit; return None if rounding fails."""
    levels_u: Ints = excess_ul.argmin(axis=1)
    scale_k = np.maximum(np.abs(rooms_k), 1)[:, None, None]
    while True:
        over_k, over_kul = _spent(costs_kul, rooms_k, levels_u)
        if (over_k <= 0).all():
            break
        relief_ul = ((np.maximum(over_k, 0)[:, None, None] - np.maximum(over_kul, 0)) / scale_k).sum(axis=0)
        dearer_ul = excess_ul - np.take_along_axis(excess_ul, levels_u[:, None], axis=1)
        rate_ul = np.full(values_ul.shape, np.inf)
        np.divide(np.maximum(dearer_ul, 0), relief_ul, out=rate_ul, where=(relief_ul > 0) & np.isfinite(values_ul))
        unit, level = np.unravel_index(rate_ul.argmin(), rate_ul.shape)
        if not np.isfinite(rate_ul[unit, level]):
            return None
        levels_u[unit] = level
    while True:
        gain_ul = _gains(values_ul, costs_kul, rooms_k, levels_u)
        unit, level = np.unravel_index(gain_ul.argmax(), gain_ul.shape)
        if gain_ul[unit, level] <= 0:
            return levels_u
        levels_u[unit] = level


def _spent(costs_kul: Ints, rooms_k: Ints, levels_u: Ints) -> tuple[Ints, Ints]:
    """Return the excess over each room now, (k,), and after each single change of one unit, (k, u, l)."""
    now_ku = costs_kul[:, np.arange(len(levels_u)), levels_u]
    over_k = now_ku.sum(axis=1) - rooms_k
    return over_k, costs_kul + (over_k[:, None] - now_ku)[:, :, None]


def _gains(values_ul: Floats, costs_kul: Ints, rooms_k: Ints, levels_u: Ints) -> Floats:
    """Return by how much each single change lowers the value; -inf for changes that do not fit or are forbidden."""
    _, over_kul = _spent(costs_kul, rooms_k, levels_u)
    current_u = values_ul[np.arange(len(levels_u)), levels_u]
    return np.where((over_kul <= 0).all(axis=0), current_u[:, None] - values_ul, -np.inf)


def fill(values_ul: Floats, costs_kul: Ints, rooms_k: Ints, levels_u: Ints) -> Ints:
    """Make units one level denser while a step fits, the largest gain first, to levels that are not forbidden."""
    levels_u, units = levels_u.copy(), np.arange(len(levels_u))
    left_k1 = (rooms_k - costs_kul[:, units, levels_u].sum(axis=1))[:, None]
    while True:
        denser_u = np.maximum(levels_u - 1, 0)
        needed_ku = costs_kul[:, units, denser_u] - costs_kul[:, units, levels_u]
        can_u = (levels_u > 0) & (needed_ku <= left_k1).all(axis=0)
        gain_u = np.where(can_u, values_ul[units, levels_u] - values_ul[units, denser_u], -np.inf)
        unit = int(gain_u.argmax())
        if gain_u[unit] == -np.inf:
            return levels_u
        left_k1 = left_k1 - needed_ku[:, unit, None]
        levels_u[unit] -= 1


def find_cheapest(values_ul: Floats, costs_kul: Ints) -> Ints:
    """Return the least cost of each unit among its finite levels, (k, u)."""
    least_ku: Ints = np.where(np.isfinite(values_ul), costs_kul, np.iinfo(np.int64).max).min(axis=2)
    return least_ku


def mark_improvements(values_s: Floats) -> NDArray[np.bool_]:
    """Mark the values below every value before them; inf is never marked."""
    before_s = np.concatenate([[np.inf], np.minimum.accumulate(values_s)[:-1]])
    return np.asarray(values_s < before_s)


def _total(values_ul: Floats, levels_u: Ints) -> float:
    return fsum(values_ul[np.arange(len(levels_u)), levels_u].tolist())
