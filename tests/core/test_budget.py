from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, denser_moves, fits, repair
from allocator.core.errors import UserError


@pytest.fixture(scope="session")
def draw_case(spaces):
    """Draws a space, a reachable budget on one cost or several, an allocation and an order."""

    def draw(data):
        space = data.draw(spaces)
        limits = {
            cost: data.draw(st.integers(space.cost(space.sparsest, cost), space.cost(space.dense, cost) + 5))
            for cost in data.draw(st.sampled_from([["params"], ["macs"], ["params", "macs"]]))
        }
        allocation = tuple(data.draw(st.integers(0, unit.num_levels - 1)) for unit in space.units)
        return space, Budget(**limits), allocation, data.draw(st.permutations(range(len(space.units))))

    return draw


@given(data=st.data())
def test_repair_is_within_the_budget_and_maximal(draw_case, data):
    space, budget, allocation, order = draw_case(data)
    repaired = repair(space, allocation, budget, order)
    assert all(0 <= level < unit.num_levels for level, unit in zip(repaired, space.units, strict=True))
    assert fits(space, repaired, budget)
    assert all(space.cost(repaired, cost) <= limit for cost, limit in budget.limits.items())
    assert denser_moves(space, repaired, budget) == []


@given(data=st.data())
def test_repair_leaves_maximal_allocations_alone(draw_case, data):
    space, budget, allocation, order = draw_case(data)
    repaired = repair(space, allocation, budget, order)
    assert repair(space, repaired, budget, order) == repaired
    assert repair(space, repaired, budget, order[::-1]) == repaired


@given(data=st.data())
def test_denser_moves_are_those_that_fit(draw_case, data):
    space, budget, allocation, _ = draw_case(data)
    expected = [
        i
        for i, level in enumerate(allocation)
        if level > 0 and fits(space, [*allocation[:i], level - 1, *allocation[i + 1 :]], budget)
    ]
    assert denser_moves(space, allocation, budget) == expected


@given(data=st.data())
def test_repair_gives_and_receives_in_the_order_asked_for(draw_case, data):
    space, budget, allocation, order = draw_case(data)
    repaired = repair(space, allocation, budget, order)
    if fits(space, allocation, budget):
        assert all(after <= before for after, before in zip(repaired, allocation, strict=True))


def test_one_unit_takes_the_densest_level_that_fits(make_space):
    space = make_space([[100, 70, 40, 5]], fixed=10)
    for limit, level in ((110, 0), (109, 1), (80, 1), (79, 2), (50, 2), (49, 3), (15, 3)):
        for start in range(4):
            assert repair(space, (start,), Budget(params=limit), [0]) == (level,)


def test_units_of_a_single_level_never_move(make_space):
    space = make_space([[50], [40, 20, 0], [30]], fixed=0)
    assert repair(space, (0, 0, 0), Budget(params=100), [2, 0, 1]) == (0, 1, 0)


def test_a_large_step_is_passed_over_and_a_small_one_fills(make_space):
    space = make_space([[100, 0], [9, 6, 3, 0]], fixed=0)
    assert repair(space, (1, 3), Budget(params=10), [0, 1]) == (1, 0)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.2, 1.7, float("nan")])
def test_targets_that_are_no_share_are_refused(space, target):
    with pytest.raises(UserError, match=r"target: expected a share in \(0, 1\)"):
        budget_for(space, target)


def test_an_unreachable_target_names_the_reachable_range(make_space):
    space = make_space([[100, 60], [300, 200]], fixed=7)
    with pytest.raises(UserError, match=r"0\.5 is out of reach of the ladders, which remove 0 to 0\.3500"):
        budget_for(space, 0.5)
    assert budget_for(space, 0.35).limits == {"params": 7 + 260}


@given(
    total=st.integers(1, 10**12),
    target=st.one_of(
        st.integers(1, 999).map(lambda v: v / 1000),
        st.floats(0.001, 0.999),
    ),
)
def test_the_limit_removes_at_least_the_target_and_no_parameter_more(make_space, total, target):
    space = make_space([[total, 0]], fixed=123)
    removed = total - (budget_for(space, target).limits["params"] - 123)
    share = Fraction(repr(target))
    assert removed >= share * total > removed - 1
