"""Multiple-choice knapsacks against brute force, and against an independent solver where that is too many."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, denser_moves, fits
from allocator.core.errors import UserError
from allocator.core.space import SearchSpace, Unit
from allocator.searchers.solvers import knapsack as module
from allocator.searchers.solvers import lagrange
from allocator.searchers.solvers.knapsack import additive_front, knapsack, knapsack_multi, knapsack_nearby
from allocator.searchers.solvers.space_arrays import SpaceArrays


def _everything(space, table, allowed=None):
    ranges = [range(u.num_levels) for u in space.units]
    if allowed is not None:
        ranges = [range(low, min(high + 1, len(r))) for r, (low, high) in zip(ranges, allowed, strict=True)]
    return [a for a in itertools.product(*ranges) if math.isfinite(_value(table, a))]


def _value(table, allocation):
    return math.fsum(row[level] for row, level in zip(table, allocation, strict=True))


def _table(data, space, falling=True, forbidden=True):
    rows = []
    for unit in space.units:
        row = data.draw(st.lists(st.floats(0, 4), min_size=unit.num_levels, max_size=unit.num_levels))
        row = list(itertools.accumulate(row)) if falling else row
        if forbidden and data.draw(st.booleans()):
            row[data.draw(st.integers(0, unit.num_levels - 1))] = math.inf
        rows.append(row)
    return rows


def _full(space, allocation, limits, table):
    moves = set.intersection(
        *(set(denser_moves(space, allocation, Budget(**{cost: limit}))) for cost, limit in limits.items())
    )
    return all(math.isinf(table[i][allocation[i] - 1]) for i in moves)


def _large(make_space, num_units, num_levels, seed):
    rng = np.random.default_rng(seed)
    ladders = [sorted(rng.choice(10**6, num_levels, replace=False).tolist(), reverse=True) for _ in range(num_units)]
    return make_space(ladders), [rng.exponential(size=num_levels).cumsum().tolist() for _ in range(num_units)]


@given(data=st.data())
def test_one_limit_is_solved_exactly(spaces, data):
    space = data.draw(spaces)
    table = _table(data, space)
    table = [row if any(map(math.isfinite, row)) else [0.0] * len(row) for row in table]
    everything = _everything(space, table)
    costs = [space.cost(a) for a in everything]
    budget = Budget(params=data.draw(st.sampled_from([min(costs), max(costs), (min(costs) + max(costs)) // 2])))
    found = knapsack(space, budget, table)
    best = min(_value(table, a) for a in everything if fits(space, a, budget))
    assert fits(space, found, budget)
    assert _full(space, found, {"params": budget.limits["params"]}, table)
    assert _value(table, found) == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(data=st.data())
def test_any_table_is_solved_exactly_before_the_fill(spaces, data):
    space = data.draw(spaces)
    table = _table(data, space, falling=False, forbidden=False)
    values, costs = module._pad(space, table, ("params",))
    room = data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))) - space.fixed["params"]
    found = lagrange.find_optimum(values, costs, np.array([room]))
    fitting = [a for a in _everything(space, table) if space.cost(a) - space.fixed["params"] <= room]
    assert tuple(found) in fitting
    assert _value(table, found) == pytest.approx(min(_value(table, a) for a in fitting), rel=1e-9, abs=1e-9)


@given(data=st.data())
def test_ranges_are_kept_unless_only_units_outside_theirs_can_fill_the_budget(spaces, data):
    space = data.draw(spaces)
    table = _table(data, space, forbidden=False)
    allowed = []
    for unit in space.units:
        low = data.draw(st.integers(0, unit.num_levels - 1))
        allowed.append((low, data.draw(st.integers(low, unit.num_levels + 1))))
    everything = _everything(space, table, allowed)
    budget = Budget(params=data.draw(st.integers(min(map(space.cost, everything)), space.cost(space.dense))))
    found = knapsack(space, budget, table, allowed)
    best = min(_value(table, a) for a in everything if fits(space, a, budget))
    assert fits(space, found, budget)
    assert not denser_moves(space, found, budget)
    assert _value(table, found) <= best + 1e-9
    assert all(level <= high for level, (_, high) in zip(found, allowed, strict=True))


@given(data=st.data())
def test_two_limits_are_solved_exactly(spaces, data):
    space = data.draw(spaces)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    units = [dataclasses.replace(unit, macs=tuple(rng.permutation(unit.macs).tolist())) for unit in space.units]
    space = type(space)(space.pattern, tuple(units), space.fixed)
    table = _table(data, space, forbidden=False)
    everything = _everything(space, table)
    limits = {
        cost: data.draw(st.sampled_from(sorted({space.cost(a, cost) for a in everything})))
        for cost in ("params", "macs")
    }
    fitting = [a for a in everything if all(space.cost(a, cost) <= limit for cost, limit in limits.items())]
    if not fitting:
        with pytest.raises(UserError, match="keeps all, though"):
            knapsack_multi(space, limits, table)
        return
    found = knapsack_multi(space, limits, table)
    assert found in fitting
    assert _full(space, found, limits, table)
    values, costs = module._pad(space, table, tuple(limits))
    rooms = np.array([limit - space.fixed[cost] for cost, limit in limits.items()])
    best = min(_value(table, a) for a in fitting)
    assert _value(table, lagrange.find_optimum(values, costs, rooms)) == pytest.approx(best, rel=1e-5, abs=1e-5)


@given(data=st.data())
def test_the_front_is_exact(spaces, data):
    space = data.draw(spaces)
    table = _table(data, space, falling=data.draw(st.booleans()), forbidden=False)
    points = additive_front(space, "params", table)
    best = {}
    for allocation in _everything(space, table):
        cost = space.cost(allocation)
        best[cost] = min(best.get(cost, math.inf), _value(table, allocation))
    assert [cost for cost, _, _ in points] == sorted({cost for cost, _, _ in points})
    assert all(a[1] > b[1] for a, b in itertools.pairwise(points))
    for cost, value, allocation in points:
        assert space.cost(allocation) == cost
        assert _value(table, allocation) == pytest.approx(value, abs=1e-9)
    for cost in best:
        reached = [value for at, value, _ in points if at <= cost]
        assert reached
        assert reached[-1] <= best[cost] + 1e-9


def test_a_front_in_buckets_holds_real_points_near_the_exact_front(make_space, monkeypatch):
    space, table = _large(make_space, 12, 5, seed=3)
    exact = additive_front(space, "params", table)
    monkeypatch.setattr(module, "MAX_BUCKETS", 500)
    coarse = additive_front(space, "params", table)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(coarse))
    assert all(space.cost(a) == cost and _value(table, a) == pytest.approx(value) for cost, value, a in coarse)
    middle = (space.cost(space.dense) + space.cost(space.sparsest)) // 2
    at = [max((p for p in front if p[0] <= middle), key=lambda p: p[0])[1] for front in (exact, coarse)]
    assert at[1] == pytest.approx(at[0], rel=0.05)


def test_the_front_and_the_knapsack_agree(space, landscape):
    table = [row.tolist() for row in landscape(space).terms]
    for cost, value, _ in additive_front(space, "params", table):
        assert _value(table, knapsack(space, Budget(params=cost), table)) == pytest.approx(value)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_large_knapsack_equals_an_independent_solver(make_space, share):
    from scipy.optimize import Bounds, LinearConstraint, milp

    space, table = _large(make_space, 40, 7, seed=1)
    limit = int(share * space.cost(space.dense))
    costs = np.array([unit.params for unit in space.units])
    one_level = np.kron(np.eye(40), np.ones(7))
    solved = milp(
        np.ravel(table),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_level, 1, 1),
            LinearConstraint(costs.reshape(1, -1), -np.inf, limit - space.fixed["params"]),
        ],
        options={"mip_rel_gap": 0},
    )
    found = knapsack(space, Budget(params=limit), table)
    assert fits(space, found, Budget(params=limit))
    assert _value(table, found) == pytest.approx(solved.fun, rel=1e-6)
    assert _value(table, found) <= solved.fun + 1e-5


def _ragged(space, table, fill):
    longest = max(unit.num_levels for unit in space.units)
    return np.array([[*row, *[fill] * (longest - len(row))] for row in table])


@given(data=st.data())
def test_nearby_is_the_knapsack_within_a_radius(spaces, data):
    space = data.draw(spaces)
    table = _table(data, space, forbidden=False)
    budget = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    radius, arrays = data.draw(st.integers(1, 3)), SpaceArrays(space, budget)
    centre = arrays.fit_to_budget(
        [data.draw(st.integers(0, last)) for last in arrays.last_u.tolist()], _ragged(space, table, 0)
    )
    allowed = [(max(0, at - radius), at + radius) for at in centre]
    table_ul = _ragged(space, table, data.draw(st.sampled_from([-1.0, 9.0])))
    best = knapsack(space, budget, table, allowed)
    assert knapsack_nearby(arrays, table_ul, centre, radius) == best
    slack = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    close = knapsack_nearby(arrays, table_ul, centre, radius, slack)
    assert arrays.fills_budget(close)
    assert _value(table, close) <= _value(table, best) + slack + 1e-9


def test_too_many_states_still_give_a_full_allocation_near_the_bound(make_space, monkeypatch):
    monkeypatch.setattr(lagrange, "MAX_STATES", 50)
    space, _ = _large(make_space, 12, 6, seed=2)
    table = [[unit.params[0] - count for count in unit.params] for unit in space.units]
    budget = Budget(params=space.cost(space.dense) // 2)
    found = knapsack(space, budget, table)
    assert not denser_moves(space, found, budget)
    assert 0 <= budget.limits["params"] - space.cost(found) < 0.001 * budget.limits["params"]


def test_equal_inputs_give_equal_allocations(space):
    table = [[0.0] * unit.num_levels for unit in space.units]
    budget = Budget(params=(space.cost(space.dense) + space.cost(space.sparsest)) // 2)
    assert len({knapsack(space, budget, table) for _ in range(3)}) == 1
    limits = {"params": budget.limits["params"], "macs": 3 * budget.limits["params"]}
    assert len({knapsack_multi(space, limits, table) for _ in range(3)}) == 1


def test_a_full_budget_is_worth_more_than_the_sum(make_space):
    space = make_space([[10, 0], [10, 0]])
    assert knapsack(space, Budget(params=space.fixed["params"] + 10), [[5.0, 0.0], [7.0, 0.0]]) == (0, 1)


def test_a_level_without_a_value_is_never_taken(make_space):
    space = make_space([[20, 10, 0]])
    assert knapsack(space, Budget(params=space.cost((0,))), [[math.inf, math.inf, 0.0]]) == (2,)


def test_a_limit_out_of_reach_names_the_range(make_space):
    space = make_space([[30, 20, 5], [40, 10]], fixed=100)
    table = [[0.0, 1.0, 2.0], [0.0, 1.0]]
    with pytest.raises(UserError, match=r"params <= 114: out of reach .* params 115 to 170"):
        knapsack(space, Budget(params=114), table)
    with pytest.raises(UserError, match=r"params <= 125: .* params 130 to 170"):
        knapsack(space, Budget(params=125), table, allowed=[(0, 1), (0, 1)])
    with pytest.raises(UserError, match=r"^macs <= 144: .* params 115 to 170, macs 145 to 310"):
        knapsack_multi(space, {"params": 130, "macs": 144}, table)
    with pytest.raises(UserError, match=space.units[1].name):
        knapsack(space, Budget(params=170), [[0.0, 1.0, 2.0], [math.inf, math.inf]])


def test_nothing_but_answers_goes_to_standard_output(capfd):
    """The solver would write a line of its own now and then: about once in thirty of these."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        costs = rng.integers(100, 4000, size=(2, 16, 8)).cumsum(axis=-1)[..., ::-1].tolist()
        units = tuple(
            Unit(
                name=f"u{u}",
                kind="channels",
                part="mlp",
                block=u,
                total=7,
                kept=tuple(range(7, -1, -1)),
                params=tuple(costs[0][u]),
                macs=tuple(costs[1][u]),
            )
            for u in range(16)
        )
        space = SearchSpace("structured", units, {"params": 0, "macs": 0})
        table = [[0.0, *np.cumsum(rng.random(7) ** 3).tolist()] for _ in units]
        limits = {}
        for cost in ("params", "macs"):
            least = space.cost(space.sparsest, cost)
            limits[cost] = int(least + rng.uniform(0.1, 0.9) * (space.cost(space.dense, cost) - least))
        knapsack_multi(space, limits, table)
    assert capfd.readouterr().out == ""
