"""``allocator import``: what it says, and that it leaves nothing where it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allocator.core.plan import Plan


@pytest.fixture
def import_args(tiny_model: Path, text_folder: Path, sets: list[str]) -> list[object]:
    return ["--model", tiny_model, "--text", text_folder, *sets]


def test_a_list_becomes_a_plan(cli: Callable[..., Any], import_args: list[object], here: Path) -> None:
    (here / "owl.txt").write_text("0.5 0.25 1.0")
    answer = cli("import", "owl.txt", "--out", "plan.json", *import_args)
    assert answer.code == 0, answer.err
    plan = Plan.load("plan.json")
    assert [round(1 - u.kept[n] / u.total, 2) for u, n in zip(plan.space.units, plan.allocation, strict=True)] == [
        *(0.5, 0.5),
        *(0.0, 0.25),
        *(1.0, 1.0),
    ]
    assert "rounding to whole items changes a unit by up to 0.2500" in answer.out
    assert "next  allocator prune plan.json" in answer.out
    answer = cli("import", "owl.txt", "--out", "again.json", *import_args, "--json")
    assert answer.json["plan"] == "again.json"
    assert Path("again.json").read_bytes() == Path("plan.json").read_bytes()


def test_bad_input_writes_nothing(refused: Callable[..., str], import_args: list[object], here: Path) -> None:
    (here / "bad.json").write_text(json.dumps({"model.layers.0.mlp.gate": 0.5}))
    (here / "levels.txt").write_text("model.layers.0.mlp.down_proj: 1\n")
    assert "did you mean" in refused("import", "bad.json", "--out", "plan.json", *import_args)
    assert "No such file" in refused("import", "none.json", "--out", "plan.json", *import_args)
    assert "metadata.pth" in refused("import", "levels.txt", "--out", "plan.json", *import_args)
    assert "--out" in refused("import", "bad.json", "--out", "no/such/plan.json", *import_args)
    both = refused("import", "levels.txt", "--out", "plan.json", "--level-step", 8, *import_args)
    assert "Give both, or neither" in both
