"""What every local pruner promises, for every pattern and kind of unit that it serves."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import KINDS
from allocator.pruning.levels.compact import cast_values, item_columns
from allocator.pruning.levels.masks import sparse_weight
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import PRUNERS, make_pruner, pruners_for
from allocator.testing.problems import unit_problem

ROWS = 10


@dataclass(frozen=True)
class Shape:
    """A unit, and how many columns of the matrix each item has."""

    unit: Unit
    width: int
    columns: int


def _items(kind, width, kept, group=None):
    unit = Unit(
        name=f"layers.0.{kind}",
        kind=kind,
        part="mlp",
        block=0,
        total=kept[0],
        kept=kept,
        params=kept,
        macs=kept,
        group=group,
    )
    return Shape(unit, width, width * kept[0])


def _matrix(columns, shares, group=None):
    kept = tuple(ROWS * share for share in (columns, *shares))
    return Shape(
        Unit(
            name="layers.0.up_proj",
            kind="matrix",
            part="mlp",
            block=0,
            total=ROWS * columns,
            kept=kept,
            params=kept,
            macs=kept,
            group=group,
        ),
        1,
        columns,
    )


SHAPES = {
    "structured": {
        "channels": _items("channels", 1, (24, 21, 12, 5, 1, 0)),
        "kv_groups": _items("kv_groups", 6, (4, 3, 2, 1, 0)),
        "query_heads": _items("query_heads", 3, (8, 6, 4, 2, 0), group=4),
    },
    "unstructured": {
        "matrix": _matrix(24, (20, 13, 12, 2, 0)),
        "wide matrix": _matrix(300, (220, 150, 1)),
    },
    "n:m": {
        "2:4": _matrix(24, (12, 6), 4),
        "7:8 to 0:8": _matrix(32, (28, 16, 4, 0), 8),
        "2:3, wide": _matrix(300, (200, 100), 3),
    },
}
"""Units by pattern and kind. A new kind is a line here."""


def cases(which=lambda unit: True):
    """Every pruner with every pattern it serves and every unit that ``which`` picks."""
    found = [
        pytest.param(pattern, name, shape, id=f"{name} {pattern} {label}")
        for name, pruner in PRUNERS.items()
        for pattern in pruner.patterns
        for label, shape in SHAPES[pattern].items()
        if which(shape.unit)
    ]
    return pytest.mark.parametrize(("pattern", "name", "shape"), found)


every = cases()


def _inputs(columns, seed=0, tokens=400):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * rng.uniform(0.2, 2.0, size=columns)
    return torch.from_numpy(rng.normal(size=(tokens, columns)) @ mixing).float()


def _weight(columns, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(ROWS, columns))).float()


def _levels(pattern, name, shape, weight_oi=None, inputs_ni=None, wanted=None):
    pruner = make_pruner(PrunerSpec(name=name), pattern)
    statistics = KINDS[pruner.need](shape.columns, torch.device("cpu"))
    statistics.add(_inputs(shape.columns) if inputs_ni is None else inputs_ni)
    weight_oi = _weight(shape.columns) if weight_oi is None else weight_oi
    return pruner.levels(unit_problem(shape.unit, weight_oi, statistics, wanted, shape.width))


def _assembled(shape, compact, level, weight_oi=None):
    """The matrix at a level, in the dense shape, and what of it is kept."""
    weight_oi = _weight(shape.columns) if weight_oi is None else weight_oi
    compact = cast_values(compact, weight_oi.dtype)
    if shape.unit.kind == "matrix":
        found_oi = sparse_weight(compact, level, weight_oi)
        return found_oi, found_oi != 0
    groups = shape.unit.total // shape.unit.group if shape.unit.group else 1
    items = compact["order"].view(groups, -1)[:, : shape.unit.kept[level] // groups].flatten()
    columns = item_columns(items.long(), shape.width)
    found_oi, kept_oi = torch.zeros_like(weight_oi), torch.zeros_like(weight_oi, dtype=torch.bool)
    if len(columns):
        found_oi[:, columns] = compact[f"output.{level}"]
    kept_oi[:, columns] = True
    return found_oi, kept_oi


@every
def test_counts_are_exact_and_what_is_removed_is_zero(pattern, name, shape):
    compact, unit = _levels(pattern, name, shape), shape.unit
    weights_per_item = 1 if unit.kind == "matrix" else ROWS * shape.width
    for level in range(1, unit.num_levels):
        found_oi, kept_oi = _assembled(shape, compact, level)
        assert int(found_oi.count_nonzero()) == int(kept_oi.sum()) == unit.kept[level] * weights_per_item
        assert not found_oi[~kept_oi].any()


@cases(lambda unit: unit.group)
def test_every_group_loses_the_same_number(pattern, name, shape):
    compact, unit = _levels(pattern, name, shape), shape.unit
    for level in range(1, unit.num_levels):
        kept_oi = _assembled(shape, compact, level)[1]
        items = kept_oi if unit.kind == "matrix" else kept_oi[0, :: shape.width]
        counts = items.view(-1, unit.group).sum(1)
        assert (counts == unit.kept[level] * unit.group // unit.total).all()


@every
def test_only_documented_tensors_are_returned(pattern, name, shape):
    compact, unit = _levels(pattern, name, shape), shape.unit
    levels = range(1, unit.num_levels)
    if unit.kind != "matrix":
        assert sorted(compact["order"].tolist()) == list(range(unit.total))
        allowed = {"order", *(f"output.{n}" for n in levels if unit.kept[n]), *(f"bias.{n}" for n in levels)}
        assert compact.keys() <= allowed
    elif "removed_at" in compact:
        assert compact.keys() == {"removed_at"}
        assert compact["removed_at"].dtype == torch.uint8
    else:
        assert compact.keys() == {f"{form}.{level}" for form in ("mask", "values") for level in levels}
        for level in levels:
            assert compact[f"mask.{level}"].dtype == torch.uint8
            assert compact[f"mask.{level}"].shape == (-(-unit.total // 8),)
            assert compact[f"values.{level}"].shape == (unit.kept[level],)


@every
def test_equal_inputs_give_equal_bits_and_are_left_alone(pattern, name, shape):
    weight_oi, inputs_ni = _weight(shape.columns), _inputs(shape.columns)
    first = _levels(pattern, name, shape, weight_oi, inputs_ni)
    assert torch.equal(weight_oi, _weight(shape.columns))
    assert torch.equal(inputs_ni, _inputs(shape.columns))
    again = _levels(pattern, name, shape, weight_oi, inputs_ni)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@every
def test_one_level_alone_is_the_same_level_among_all(pattern, name, shape):
    compact = _levels(pattern, name, shape)
    for level in range(1, shape.unit.num_levels):
        alone = _levels(pattern, name, shape, wanted=[level])
        assert torch.equal(_assembled(shape, alone, level)[0], _assembled(shape, compact, level)[0])


@every
@pytest.mark.parametrize("problem", ["dead inputs", "one token", "equal inputs", "all dead", "huge", "minute"])
def test_odd_inputs_give_finite_levels_of_exact_counts(pattern, name, shape, problem):
    inputs_ni = _inputs(shape.columns)
    if problem == "dead inputs":
        inputs_ni[:, [0, 3, 4, 5, 17]] = 0.0
    elif problem == "one token":
        inputs_ni = inputs_ni[:1]
    elif problem == "equal inputs":
        inputs_ni[:] = inputs_ni[:, :1]
    elif problem == "all dead":
        inputs_ni[:] = 0.0
    else:
        inputs_ni *= 1e8 if problem == "huge" else 1e-8
    compact = _levels(pattern, name, shape, inputs_ni=inputs_ni)
    for level in range(1, shape.unit.num_levels):
        found_oi, kept_oi = _assembled(shape, compact, level)
        assert torch.isfinite(found_oi).all()
        per_item = 1 if shape.unit.kind == "matrix" else ROWS * shape.width
        assert int(kept_oi.sum()) == shape.unit.kept[level] * per_item


@cases(lambda unit: unit.kept[-1] == 0)
def test_a_level_that_keeps_nothing_is_zero(pattern, name, shape):
    last = shape.unit.num_levels - 1
    compact = _levels(pattern, name, shape, wanted=[last])
    assert not _assembled(shape, compact, last)[0].any()
    assert all(not tensor.numel() for key, tensor in compact.items() if key.startswith(("values", "output")))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_data_type_are_accepted(pattern, name, shape, dtype):
    weight_oi = _weight(shape.columns).to(dtype)
    compact = _levels(pattern, name, shape, weight_oi)
    single = _levels(pattern, name, shape, weight_oi.float())
    for level in range(1, shape.unit.num_levels):
        found_oi, kept_oi = _assembled(shape, compact, level, weight_oi)
        assert found_oi.dtype == dtype
        expected_oi, also_kept_oi = _assembled(shape, single, level, weight_oi.float())
        assert torch.equal(kept_oi, also_kept_oi)
        torch.testing.assert_close(found_oi.double(), expected_oi.double(), rtol=1e-2, atol=1e-5)


@st.composite
def _matrices(draw):
    """A small matrix of few distinct values, so that scores are often equal, with a ladder of its own."""
    group = draw(st.none() | st.integers(1, 6))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5)) * (group or draw(st.integers(1, 3)))
    most = group or columns
    counts = draw(st.lists(st.integers(0, most - 1), min_size=1, max_size=6, unique=True))
    kept = tuple(rows * columns // most * count for count in (most, *sorted(counts, reverse=True)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight_oi = torch.from_numpy(rng.integers(-1, 2, size=(rows, columns))).float()
    inputs_ni = torch.from_numpy(rng.integers(0, 2, size=(draw(st.integers(1, 8)), columns))).float()
    return (
        Unit(
            name="up_proj",
            kind="matrix",
            part="mlp",
            block=0,
            total=rows * columns,
            kept=kept,
            params=kept,
            macs=kept,
            group=group,
        ),
        weight_oi,
        inputs_ni,
    )


@pytest.mark.parametrize("name", pruners_for("n:m"))
@given(problem=_matrices())
def test_counts_are_exact_however_scores_tie(name, problem):
    unit, weight_oi, inputs_ni = problem
    pruner = make_pruner(PrunerSpec(name=name), "n:m")
    statistics = KINDS[pruner.need](weight_oi.shape[1], torch.device("cpu"))
    statistics.add(inputs_ni)
    compact = pruner.levels(unit_problem(unit, weight_oi, statistics))
    if "removed_at" not in compact:
        ones = {key: torch.ones_like(t) if key.startswith("values") else t for key, t in compact.items()}
        assert all(torch.isfinite(tensor).all() for tensor in compact.values())
    else:
        ones = compact
    for level in range(1, unit.num_levels):
        kept_oi = sparse_weight(ones, level, torch.ones_like(weight_oi))
        assert int(kept_oi.sum()) == unit.kept[level]
        if unit.group:
            assert len(kept_oi.view(-1, unit.group).sum(1).unique()) == 1
