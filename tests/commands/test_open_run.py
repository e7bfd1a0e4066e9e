"""A run from Python: rows of its front and evaluations, its figures, and plans for any of its points."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import allocator
from allocator.commands.open_run import Records
from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.plan import Plan

REFERENCE = Path(__file__).parents[2] / "runs" / "reference"


def test_the_front_is_that_of_the_file() -> None:
    run = allocator.open_run(REFERENCE)
    points = json.loads((REFERENCE / "front.json").read_text())["points"]
    assert list(run.front) == points
    assert run.front[0]["allocation"] == points[0]["allocation"]
    assert run.front[-2:] == points[-2:]


def test_evaluations_are_those_of_the_journal() -> None:
    run, journal = allocator.open_run(str(REFERENCE)), Journal.read(REFERENCE / "journal.jsonl")
    rows = run.evaluations
    assert len(rows) == sum(len(batch) for batch in journal.batches)
    for row, outcome in zip(rows, (o for batch in journal.batches for o in batch), strict=True):
        assert tuple(row["allocation"]) == outcome.request.allocation
        assert row["params"] == journal.space.cost(outcome.request.allocation)
        assert row["kl"] == outcome.measured["kl"]
        assert (row["split"], row["tokens"]) == (outcome.request.split, outcome.request.tokens)


def test_figures_are_those_of_the_result() -> None:
    run = allocator.open_run(REFERENCE)
    assert run.figures == run.result["measured"]
    assert run.figures["dense"]["kl"] == 0


def test_a_plan_of_the_run_and_of_its_points() -> None:
    run = allocator.open_run(REFERENCE)
    assert run.plan() == Plan.load(REFERENCE / "plan.json")
    member = run.plan(index=1)
    assert list(member.allocation) == run.front[1]["allocation"]
    limit = run.front[1]["params"]
    bounded = run.plan(where=f"params <= {limit}")
    assert bounded == run.plan(where=[f"params <= {limit}"])
    assert bounded.space.cost(bounded.allocation) <= limit
    assert bounded.measured["search_split"]["kl"] == min(
        row["kl"]
        for row in run.evaluations
        if row["params"] <= limit and (row["split"], row["tokens"], row["probe"]) == ("search", 8192, "")
    )
    assert tuple(run.plan(knee=True).allocation) in {tuple(row["allocation"]) for row in run.front}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"index": 99}, "the front has members 0 to 2, and 99 was asked for"),
        ({"index": 1, "knee": True}, "exclude each other"),
        ({"where": "params <= 1"}, "no measured allocation keeps params <= 1"),
        ({"best": "speed"}, "unknown figure 'speed'"),
    ],
)
def test_what_a_run_does_not_have_is_refused(asked: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        allocator.open_run(REFERENCE).plan(**asked)


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\. Name the folder of a run"):
        allocator.open_run(tmp_path)


def test_records_make_a_data_frame_where_pandas_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert repr(records) == "Records(2 rows: a, b)"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        records.to_pandas()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    assert records.to_pandas().equals(pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
