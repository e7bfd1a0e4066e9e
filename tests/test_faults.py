"""Faults, on a real local Ray cluster: a trial of two kinds of the benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import faults


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def reference(work: Path) -> dict[str, Any]:
    """The undisturbed search."""
    return faults.make_reference(work)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("torn", 0), ("worker", 3), ("two", 5)])
def test_a_search_survives(work: Path, reference: dict[str, Any], kind: str, number: int) -> None:
    found = faults.run_trial(work, kind, number, reference)
    assert found["survived"], found
    assert found["twice"] == 0
    assert found["lost"] <= 8


def test_what_was_under_way_is_counted_by_worker(tmp_path: Path) -> None:
    lines = [
        {"worker": 1, "begun": 3, "key": None},
        {"worker": 2, "begun": 1, "key": None},
        {"worker": 1, "begun": 0, "key": "a"},
        {"worker": 2, "begun": 0, "key": "b"},
        {"worker": 1, "begun": 0, "key": "c"},
    ]
    log = tmp_path / "measured.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"worker": 1, "beg')
    assert faults.interrupted([log]) == 1
    assert [line["key"] for line in faults.noted(log) if line["key"]] == ["a", "b", "c"]


def test_how_far_a_run_is() -> None:
    """From the files of the reference run, which is done."""
    run = Path(__file__).parent.parent / "runs" / "reference"
    assert faults.PHASES[faults.reached(run)[0]] == "writing"
    assert faults.reached(run / "nothing") == (0, 0)
