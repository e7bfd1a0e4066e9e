"""The contract of local pruners, for every pattern and kind of unit that they serve.

::

    class TestMine(PrunerContract):
        pruner = MyPruner()

Shapes: n tokens, o output rows, i input features. ``inputs_ni``, ``weight_oi``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import KINDS
from allocator.pruning.levels.compact import CompactLevels, cast_values, item_columns
from allocator.pruning.levels.masks import sparse_weight
from allocator.pruning.pruners.protocol import LocalPruner, PrunerSpec
from allocator.testing.problems import unit_problem

ROWS = 10


@dataclass(frozen=True)
class Shape:
    """A unit, and how many columns of its matrix each item has."""

    unit: Unit
    width: int
    columns: int

    @property
    def weights_per_item(self) -> int:
        """Weights of one item of the unit."""
        return 1 if self.unit.kind == "matrix" else ROWS * self.width


def _unit(kind: str, kept: tuple[int, ...], group: int | None) -> Unit:
    return Unit(
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


def _items(kind: str, width: int, kept: tuple[int, ...], group: int | None = None) -> Shape:
    return Shape(_unit(kind, kept, group), width, width * kept[0])


def _matrix(columns: int, shares: Sequence[int], group: int | None = None) -> Shape:
    return Shape(_unit("matrix", tuple(ROWS * share for share in (columns, *shares)), group), 1, columns)


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

ODD_INPUTS = ("dead inputs", "one token", "equal inputs", "all dead", "huge", "minute")


def make_inputs(columns: int, seed: int = 0, tokens: int = 400) -> torch.Tensor:
    """Return correlated inputs of unequal scale, [tokens, columns]."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * rng.uniform(0.2, 2.0, size=columns)
    return torch.from_numpy(rng.normal(size=(tokens, columns)) @ mixing).float()


def make_odd_inputs(columns: int, problem: str) -> torch.Tensor:
    """Return inputs with one of :data:`ODD_INPUTS`."""
    inputs_ni = make_inputs(columns)
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
    return inputs_ni


def make_weight(columns: int, seed: int = 1) -> torch.Tensor:
    """Return a random weight, [rows, columns]."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(ROWS, columns))).float()


def assemble(
    shape: Shape, compact: CompactLevels, level: int, weight_oi: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix at a level, in the dense shape, and which of its weights are kept."""
    weight_oi = make_weight(shape.columns) if weight_oi is None else weight_oi
    compact = cast_values(compact, weight_oi.dtype)
    unit = shape.unit
    if unit.kind == "matrix":
        level_oi = sparse_weight(compact, level, weight_oi)
        return level_oi, level_oi != 0
    groups = unit.total // unit.group if unit.group else 1
    items = compact["order"].view(groups, -1)[:, : unit.kept[level] // groups].flatten()
    columns = item_columns(items.long(), shape.width)
    level_oi, kept_oi = torch.zeros_like(weight_oi), torch.zeros_like(weight_oi, dtype=torch.bool)
    if len(columns):
        level_oi[:, columns] = compact[f"output.{level}"]
    kept_oi[:, columns] = True
    return level_oi, kept_oi


@st.composite
def draw_tied_matrices(draw: st.DrawFn, grouped: bool) -> tuple[Unit, torch.Tensor, torch.Tensor]:
    """Draw a small matrix of few distinct values, so that scores are often equal, with a ladder and its inputs."""
    group = draw(st.none() | st.integers(1, 6)) if grouped else None
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5)) * (group or draw(st.integers(1, 3)))
    most = group or columns
    counts = draw(st.lists(st.integers(0, most - 1), min_size=1, max_size=6, unique=True))
    kept = tuple(rows * columns // most * count for count in (most, *sorted(counts, reverse=True)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight_oi = torch.from_numpy(rng.integers(-1, 2, size=(rows, columns))).float()
    inputs_ni = torch.from_numpy(rng.integers(0, 2, size=(draw(st.integers(1, 8)), columns))).float()
    return _unit("matrix", kept, group), weight_oi, inputs_ni


class PrunerContract:
    """What every local pruner promises.

    Attributes:
        pruner: The pruner to test.
    """

    pruner: LocalPruner

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test with every unit of the patterns that the pruner serves."""
        if "shape" not in metafunc.fixturenames:
            return
        grouped = metafunc.function.__name__ == "test_every_group_loses_the_same_number"
        empty = metafunc.function.__name__ == "test_a_level_that_keeps_nothing_is_zero"
        shapes = {
            f"{pattern} {label}": shape
            for pattern in self.pruner.patterns
            for label, shape in SHAPES[pattern].items()
            if (shape.unit.group or not grouped) and (shape.unit.kept[-1] == 0 or not empty)
        }
        metafunc.parametrize("shape", shapes.values(), ids=shapes)

    def solve(
        self,
        shape: Shape,
        weight_oi: torch.Tensor | None = None,
        inputs_ni: torch.Tensor | None = None,
        levels: Iterable[int] | None = None,
    ) -> CompactLevels:
        """Return the compact levels of a unit; all levels, of random weights and inputs, by default."""
        statistics = KINDS[self.pruner.need](shape.columns, torch.device("cpu"))
        statistics.add(make_inputs(shape.columns) if inputs_ni is None else inputs_ni)
        weight_oi = make_weight(shape.columns) if weight_oi is None else weight_oi
        return self.pruner.levels(unit_problem(shape.unit, weight_oi, statistics, levels, shape.width))

    def test_it_says_what_it_is(self) -> None:
        """The name is not empty, and patterns and statistics are known."""
        assert self.pruner.name
        assert self.pruner.patterns
        assert {*self.pruner.patterns} <= SHAPES.keys()
        assert self.pruner.need in KINDS
        assert self.pruner.refit is None or self.pruner.need == "gram"

    def test_a_record_of_its_settings_makes_it_again(self) -> None:
        """Settings have JSON types, and the settings of a plan make the same pruner."""
        record: dict[str, Any] = json.loads(json.dumps(dict(self.pruner.settings())))
        assert record == self.pruner.settings()
        make = getattr(type(self.pruner), "from_spec", None)
        if make is not None:
            again = make(PrunerSpec.from_plan({"name": self.pruner.name, **record}))
            assert (again.name, again.settings(), again.refit) == (self.pruner.name, record, self.pruner.refit)

    def test_counts_are_exact_and_what_is_removed_is_zero(self, shape: Shape) -> None:
        """Every level keeps as many items as the ladder says."""
        compact, unit = self.solve(shape), shape.unit
        for level in range(1, unit.num_levels):
            level_oi, kept_oi = assemble(shape, compact, level)
            assert int(level_oi.count_nonzero()) == int(kept_oi.sum()) == unit.kept[level] * shape.weights_per_item
            assert not level_oi[~kept_oi].any()

    def test_every_group_loses_the_same_number(self, shape: Shape) -> None:
        """All groups of a unit keep the same number."""
        compact, unit = self.solve(shape), shape.unit
        assert unit.group is not None
        for level in range(1, unit.num_levels):
            kept_oi = assemble(shape, compact, level)[1]
            items = kept_oi if unit.kind == "matrix" else kept_oi[0, :: shape.width]
            counts = items.view(-1, unit.group).sum(1)
            assert (counts == unit.kept[level] * unit.group // unit.total).all()

    def test_only_documented_tensors_are_returned(self, shape: Shape) -> None:
        """The levels have one of the forms of :mod:`allocator.pruning.levels.compact`."""
        compact, unit = self.solve(shape), shape.unit
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

    def test_equal_inputs_give_equal_bits_and_are_left_alone(self, shape: Shape) -> None:
        """The same problem has the same levels, and its tensors are not changed."""
        weight_oi, inputs_ni = make_weight(shape.columns), make_inputs(shape.columns)
        first = self.solve(shape, weight_oi, inputs_ni)
        assert torch.equal(weight_oi, make_weight(shape.columns))
        assert torch.equal(inputs_ni, make_inputs(shape.columns))
        again = self.solve(shape, weight_oi, inputs_ni)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)

    def test_one_level_alone_is_the_same_level_among_all(self, shape: Shape) -> None:
        """A level does not depend on which others are made."""
        compact = self.solve(shape)
        for level in range(1, shape.unit.num_levels):
            alone = self.solve(shape, levels=[level])
            assert torch.equal(assemble(shape, alone, level)[0], assemble(shape, compact, level)[0])

    @pytest.mark.parametrize("problem", ODD_INPUTS)
    def test_odd_inputs_give_finite_levels_of_exact_counts(self, shape: Shape, problem: str) -> None:
        """Degenerate inputs give finite values and exact counts."""
        compact = self.solve(shape, inputs_ni=make_odd_inputs(shape.columns, problem))
        for level in range(1, shape.unit.num_levels):
            level_oi, kept_oi = assemble(shape, compact, level)
            assert torch.isfinite(level_oi).all()
            assert int(kept_oi.sum()) == shape.unit.kept[level] * shape.weights_per_item

    def test_a_level_that_keeps_nothing_is_zero(self, shape: Shape) -> None:
        """A level that keeps nothing holds nothing."""
        last = shape.unit.num_levels - 1
        compact = self.solve(shape, levels=[last])
        assert not assemble(shape, compact, last)[0].any()
        assert all(not tensor.numel() for key, tensor in compact.items() if key.startswith(("values", "output")))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_weights_of_any_data_type_are_accepted(self, shape: Shape, dtype: torch.dtype) -> None:
        """A weight of another data type is pruned as in float32."""
        weight_oi = make_weight(shape.columns).to(dtype)
        compact = self.solve(shape, weight_oi)
        single = self.solve(shape, weight_oi.float())
        for level in range(1, shape.unit.num_levels):
            level_oi, kept_oi = assemble(shape, compact, level, weight_oi)
            assert level_oi.dtype == dtype
            expected_oi, also_kept_oi = assemble(shape, single, level, weight_oi.float())
            assert torch.equal(kept_oi, also_kept_oi)
            torch.testing.assert_close(level_oi.double(), expected_oi.double(), rtol=1e-2, atol=1e-5)

    @settings(
        deadline=None,
        max_examples=60,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors],  # subclasses run the test too
    )
    @given(data=st.data())
    def test_counts_are_exact_however_scores_tie(self, data: st.DataObject) -> None:
        """Ties leave counts exact; only for pruners of single weights."""
        if self.pruner.patterns == ("structured",):
            return
        unit, weight_oi, inputs_ni = data.draw(draw_tied_matrices("n:m" in self.pruner.patterns))
        compact = self.solve(Shape(unit, 1, weight_oi.shape[1]), weight_oi, inputs_ni)
        ones = compact
        if "removed_at" not in compact:
            ones = {key: torch.ones_like(t) if key.startswith("values") else t for key, t in compact.items()}
            assert all(torch.isfinite(tensor).all() for tensor in compact.values())
        for level in range(1, unit.num_levels):
            kept_oi = sparse_weight(ones, level, torch.ones_like(weight_oi))
            assert int(kept_oi.sum()) == unit.kept[level]
            if unit.group:
                counts = kept_oi.view(-1, unit.group).sum(1)
                assert (counts == counts[0]).all()
