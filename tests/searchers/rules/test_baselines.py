import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, denser_moves, fits
from allocator.core.errors import UserError
from allocator.searchers.rules.baselines import two_rate, uniform


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), eighths=st.integers(1, 7))
def test_uniform_is_exact_at_a_level_equal_to_the_target(make_space, sizes, eighths):
    space = make_space([[size * kept for kept in range(8, -1, -1)] for size in sizes], fixed=17)
    budget = budget_for(space, eighths / 8)
    even = uniform(space, budget)
    assert even == (eighths,) * len(sizes)
    assert space.cost(even) == budget.limits["params"]


def test_uniform_between_levels_gives_what_is_left_over_to_the_first_units(make_space):
    space = make_space([[40, 30, 20, 10, 0]] * 4, fixed=0)
    budget = budget_for(space, 0.35)
    assert budget.limits["params"] == 104
    assert uniform(space, budget) == (1, 1, 2, 2)


def test_uniform_is_not_thrown_off_by_the_rounding_of_ladders(make_space):
    space = make_space([[1000, 700, 599, 500, 0], [1000, 700, 602, 500, 0], [1000, 700, 600, 500, 0]] * 4, fixed=0)
    even = uniform(space, budget_for(space, 0.4))
    assert sum(level != 2 for level in even) <= 1


@given(data=st.data(), target=st.floats(0.02, 0.98))
def test_uniform_keeps_and_fills_every_budget(spaces, data, target):
    space = data.draw(spaces)
    reach = space.sparsity(space.sparsest) if space.unit_params else 0.0
    if reach < target:
        return
    budget = budget_for(space, target)
    even = uniform(space, budget)
    assert fits(space, even, budget)
    assert denser_moves(space, even, budget) == []


@given(data=st.data())
def test_two_rate_keeps_and_fills_every_budget(spaces, data):
    space = data.draw(spaces.filter(lambda space: len(space.units) > 1))
    budget = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    sweep = two_rate(space, budget)
    assert sweep
    assert len(set(sweep)) == len(sweep)
    for allocation in sweep:
        assert fits(space, allocation, budget)
        assert denser_moves(space, allocation, budget) == []


def test_two_rate_tries_every_rate_of_attention(make_space):
    space = make_space([[40, 20, 0], [80, 60, 40, 20, 0]] * 2, fixed=0)
    sweep = two_rate(space, budget_for(space, 0.5))
    assert sweep == [(0, 3, 0, 3), (1, 2, 1, 2), (2, 1, 2, 1)]


@pytest.mark.parametrize("parts", [("attention",), ("mlp",)])
def test_two_rate_needs_both_parts(make_space, parts):
    space = make_space([[4, 2, 0]] * 3, parts=parts)
    with pytest.raises(UserError, match="two-rate"):
        two_rate(space, budget_for(space, 0.5))
