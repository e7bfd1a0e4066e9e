from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allocator.interop.targets.ratios import Ratios


@pytest.fixture
def structured_opt(execute: Callable[..., Any], make_model: Callable[..., Path]) -> Any:
    """Its feed-forward networks have the names of their output projections."""
    return execute(make_model("opt", num_hidden_layers=3), "structured", levels=(1, 8, 4, 3, 0, 1))


@pytest.fixture
def unstructured_opt(execute: Callable[..., Any], make_model: Callable[..., Path]) -> Any:
    return execute(make_model("opt", num_hidden_layers=3), "unstructured")


@pytest.mark.parametrize(
    "name", ["structured", "query_heads", "unstructured", "n_m", "structured_opt", "unstructured_opt"]
)
def test_ratios_are_those_of_the_checkpoint(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    executed: Any = request.getfixturevalue(name)
    Ratios().write(executed.source, tmp_path)
    with (tmp_path / "modules.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert json.loads((tmp_path / "ratios.json").read_text()) == {r["module"]: float(r["sparsity"]) for r in rows}
    for row in rows:
        assert int(row["kept"]) / (int(row["rows"]) * int(row["columns"])) == pytest.approx(1 - float(row["sparsity"]))
    weighted, unweighted = (np.load(tmp_path / f"blocks-{kind}.npy") for kind in ("weighted", "unweighted"))
    for block in range(3):
        own = [row for row in rows if int(row["block"]) == block]
        sizes = np.array([int(r["rows"]) * int(r["columns"]) for r in own])
        ratios = np.array([float(r["sparsity"]) for r in own])
        assert weighted[block] == pytest.approx((ratios * sizes).sum() / sizes.sum())
        assert unweighted[block] == pytest.approx(ratios.mean())
