import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, denser_moves, fits
from allocator.core.space import SearchSpace, Unit
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.surrogates.shapes import MAX_COEFFICIENTS, Shapes

EIGHTHS = [80, 70, 60, 50, 40, 30, 20, 10, 0]
PAIRS = [EIGHTHS, [7 * kept for kept in EIGHTHS]]


def _matrices(roles, blocks):
    ladder = tuple(EIGHTHS)
    units = (
        Unit(
            name=f"model.layers.{block}.{part}.{name}",
            kind="matrix",
            part=part,
            block=block,
            total=80,
            kept=ladder,
            params=ladder,
            macs=ladder,
        )
        for block in range(blocks)
        for part, names in roles.items()
        for name in names
    )
    return SearchSpace("unstructured", tuple(units), {"params": 0, "macs": 0})


@given(data=st.data())
def test_every_point_of_the_box_keeps_and_fills_the_budget(spaces, data):
    space = data.draw(spaces)
    cost = data.draw(st.sampled_from(["params", "macs"]))
    limit = data.draw(st.integers(space.cost(space.sparsest, cost), space.cost(space.dense, cost)))
    shapes, budget = Shapes(space), Budget(**{cost: limit})
    assert len(shapes.names) <= MAX_COEFFICIENTS
    box = st.lists(st.floats(-1.0, 1.0), min_size=len(shapes.names), max_size=len(shapes.names))
    allocation = shapes.allocation(data.draw(box), budget)
    assert all(0 <= level < unit.num_levels for level, unit in zip(allocation, space.units, strict=True))
    assert fits(space, allocation, budget)
    assert denser_moves(space, allocation, budget) == []


@given(data=st.data(), target=st.floats(0.02, 0.98))
def test_what_is_nearest_an_allocation_lies_in_the_box(spaces, data, target):
    space = data.draw(spaces)
    reach = space.sparsity(space.sparsest) if space.unit_params else 0.0
    if reach < target:
        return
    shapes = Shapes(space)
    allocation = tuple(data.draw(st.integers(0, u.num_levels - 1)) for u in space.units)
    coefficients = shapes.nearest(allocation, budget_for(space, target))
    assert len(coefficients) == len(shapes.names)
    assert all(-1.0 <= value <= 1.0 for value in coefficients)


@pytest.mark.parametrize("eighths", range(1, 8))
def test_zeros_are_uniform(make_space, eighths):
    space = make_space(PAIRS * 6, fixed=17)
    budget = budget_for(space, eighths / 8)
    shapes = Shapes(space)
    assert shapes.allocation([0.0] * len(shapes.names), budget) == (eighths,) * 12 == uniform(space, budget)


@pytest.mark.parametrize("target", [0.33, 0.55, 0.71])
def test_zeros_between_levels_are_uniform_to_within_a_level(make_space, target):
    space = make_space([EIGHTHS] * 12)
    shapes = Shapes(space)
    levels = shapes.allocation([0.0] * len(shapes.names), budget_for(space, target))
    assert set(levels) == {int(target * 8), int(target * 8) + 1}


def test_seats_are_dealt_by_largest_remainder(make_space):
    """Ladders of equal single steps: the allocation is Hamilton's apportionment of what the curves keep."""
    space = make_space([list(range(20, -1, -1))] * 10, fixed=0)
    budget = budget_for(space, 0.5)
    shapes = Shapes(space)
    rng = np.random.default_rng(3)
    for _ in range(20):
        coefficients = rng.uniform(-0.3, 0.3, len(shapes.names))  # no unit saturates
        depth = (np.repeat(np.arange(5), 2) + 0.5) / 5
        mlp = np.arange(10) % 2 == 1
        wanted = np.where(mlp, coefficients[shapes.names.index("mlp")], 0.0)
        for part, inside in (("attention", ~mlp), ("mlp", mlp)):
            for waves in range(1, 5):
                curve = np.cos(np.pi * waves * depth) / waves
                wanted += inside * curve * coefficients[shapes.names.index(f"{part}/{waves}")]
        quota = 20 * (0.5 + 0.5 * (wanted - wanted.mean()))
        assert quota.min() > 0 and quota.max() < 20, "the test's own premise"  # noqa: PT018
        seats = np.floor(quota).astype(int)
        for unit in np.argsort(-(quota - seats))[: 100 - seats.sum()]:
            seats[unit] += 1
        assert shapes.allocation(coefficients.tolist(), budget) == tuple((20 - seats).tolist())


def test_a_role_that_is_preferred_keeps_more(make_space):
    space = make_space([EIGHTHS] * 12)
    shapes, budget = Shapes(space), budget_for(space, 0.5)
    for value in (-1.0, -0.4, 0.4, 1.0):
        coefficients = [value if name == "mlp" else 0.0 for name in shapes.names]
        allocation = shapes.allocation(coefficients, budget)
        assert np.sign(sum(allocation[0::2]) - sum(allocation[1::2])) == np.sign(value)


def test_a_drawn_allocation_is_found_again(make_space):
    space = make_space([list(range(1000, -1, -5)), list(range(2000, -1, -10))] * 8)
    shapes, budget = Shapes(space), budget_for(space, 0.4)
    coefficients = np.random.default_rng(0).uniform(-0.3, 0.3, len(shapes.names))
    found = shapes.nearest(shapes.allocation(coefficients.tolist(), budget), budget)
    np.testing.assert_allclose(found, coefficients, atol=0.05)


@pytest.mark.parametrize(
    ("roles", "names"),
    [
        ({"attention": ["q", "k"], "mlp": ["up", "down"]}, ["k", "up", "down", "attention/1", "mlp/1"]),
        ({"mlp": ["0", "1"]}, ["mlp/1", "mlp/2"]),
        ({"mlp": [f"w{i}" for i in range(9)]}, ["mlp/1", "mlp/2"]),
    ],
    ids=["roles", "numbered", "too many roles"],
)
def test_constants_are_for_roles_and_curves_for_parts(roles, names):
    space = _matrices(roles, blocks=3)
    assert Shapes(space).names[: len(names)] == names


def test_there_are_never_more_than_16():
    space = _matrices({"attention": list("qkvo"), "mlp": ["gate", "up", "down"]}, blocks=80)
    names = Shapes(space).names
    assert names == [*"kvo", "gate", "up", "down", *(f"{p}/{k}" for k in range(1, 6) for p in ("attention", "mlp"))]
