import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.space import SearchSpace, Unit


@given(data=st.data())
def test_cost_is_fixed_plus_the_naive_sum(spaces, data):
    space = data.draw(spaces)
    allocation = [data.draw(st.integers(0, unit.num_levels - 1)) for unit in space.units]
    for cost in ("params", "macs"):
        total = space.fixed[cost]
        for index, unit in enumerate(space.units):
            total += (unit.params if cost == "params" else unit.macs)[allocation[index]]
        assert space.cost(allocation, cost) == total
        assert type(space.cost(allocation, cost)) is int


@given(data=st.data())
def test_json_round_trip(spaces, data):
    space = data.draw(spaces)
    again = SearchSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.to_json() == space.to_json()


def test_extremes_and_shares(make_space):
    space = make_space([[100, 50, 0], [300, 30]], fixed=600)
    assert space.dense == (0, 0)
    assert space.sparsest == (2, 1)
    assert space.unit_params == 400
    assert space.sparsity(space.dense) == 0.0
    assert space.sparsity((1, 1)) == pytest.approx(1 - 80 / 400)
    assert space.compute_share(space.dense) == 1.0
    assert space.compute_share((2, 1)) == pytest.approx((600 + 90) / (600 + 1200))


@pytest.mark.parametrize(("target", "limit"), [(0.5, 600 + 200), (0.25, 900), (0.1, 960), (0.3, 880), (0.001, 999)])
def test_limit_for_is_exact(make_space, target, limit):
    assert make_space([[100, 0], [300, 0]], fixed=600).limit_for(target) == limit


def test_limit_for_is_exact_for_billions_of_parameters(make_space):
    assert make_space([[10**10, 10**9, 0]], fixed=0).limit_for(0.9) == 10**9


@pytest.mark.parametrize("kept", [(3, 2, 2), (2, 1, 0), (3, 4)])
def test_ladders_start_dense_and_fall(kept):
    with pytest.raises(AssertionError):
        Unit(name="u", kind="channels", part="mlp", block=0, total=3, kept=kept, params=kept, macs=kept)
