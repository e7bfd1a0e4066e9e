"""Searches within several bounds, and the latency table that some of them need."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from allocator.core.budget import denser_moves
from allocator.core.latency import LatencyTable
from allocator.core.plan import Plan
from allocator.evaluation.latency import describe
from allocator.model.checkpoint.headers import read_checkpoint

Cli = Callable[..., "Answer"]  # noqa: F821
WORK = ["--set", "workload.prompt=48", "--set", "workload.generate=8"]


@pytest.fixture(scope="session")
def table(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latency table of the tiny model, measured here."""
    import allocator as api
    from allocator.run.config.load import load_config

    path = tmp_path_factory.mktemp("latency") / "table.json"
    config = load_config(None, {"model": str(tiny_model)}, [item for item in WORK if "=" in item])
    api.measure_latency(path, config=config, repeats=15)
    return path


def test_a_table_has_every_level_of_every_shape(table: Path, cli: Cli, tiny_model: Path) -> None:
    own = LatencyTable.load(table)
    units = cli("inspect", tiny_model, "--json").json["units"]
    ladders = {unit["kind"]: unit["kept"] for unit in units}
    measured = {shape.split(" of ")[0]: [timing.kept for timing in timings] for shape, timings in own.units.items()}
    assert measured == ladders
    assert own.device == describe("cpu")
    assert own.settings.repeats == 15
    dense = [timings[0].prefill_ns for timings in own.units.values()]
    assert own.fixed.prefill_ns + sum(dense) > 0  # of one alone, others on the machine may leave nothing
    assert all(timing.prefill_ns >= 0 for timings in own.units.values() for timing in timings)


def test_latency_prints_and_emits_the_table(cli: Cli, tiny_model: Path, here: Path) -> None:
    answer = cli("latency", "--model", tiny_model, "--out", here / "t.json", "--repeats", 1, *WORK, "--json")
    assert answer.code == 0, answer.err
    assert answer.json == json.loads((here / "t.json").read_text())
    answer = cli("latency", "--model", tiny_model, "--out", here / "t.json", "--repeats", 1, *WORK)
    assert "outside sub-blocks" in answer.out
    assert "--set workload.latency=" in answer.out


def test_a_plan_keeps_and_fills_every_bound(
    cli: Cli, search_args: list[object], table: Path, here: Path, tiny_model: Path
) -> None:
    bounds = ["params <= 0.8x", "kv_bytes <= 0.5x", "latency_ms <= 0.9x"]
    flags = [part for bound in bounds for part in ("--constraint", bound)]
    answer = cli(*search_args, *flags, *WORK, "--set", f"workload.latency={table}", "--json")
    assert answer.code == 0, answer.err
    result, plan = answer.json, Plan.load(here / "runs" / "run" / "plan.json")
    assert result["asked"] == ", ".join(bounds)
    space, dense = plan.space, plan.space.dense
    assert plan.budget.limits.keys() == {"params", "kv_bytes", "latency_ms"}
    for (cost, limit), bound in zip(plan.budget.limits.items(), bounds, strict=True):
        share = float(bound.split("<=")[1].strip(" x"))
        assert limit == int(share * space.cost(dense, cost) + 1e-6)
        assert space.cost(plan.allocation, cost) <= limit
    assert denser_moves(space, plan.allocation, plan.budget) == []
    checkpoint = read_checkpoint(Path(result["checkpoint"]))
    assert 4 * sum(map(prod, checkpoint.shapes.values())) == space.cost(plan.allocation, "weight_bytes")
    for name in ("dense", "uniform", "searched"):
        for figures in result["latency"][name].values():
            assert figures["predicted"] > 0
            assert figures["measured"] > 0
    whole = result["latency"]["dense"]["latency_ms"]["predicted"]
    assert whole == pytest.approx(space.cost(dense, "latency_ms") / 1e6, abs=1e-6)
    page = (here / "runs" / "run" / "report.html").read_text()
    assert f"{result['latency']['searched']['latency_ms']['predicted']:,.3f}" in page
    text = cli("plan", here / "runs" / "run").out
    assert "kv_bytes" in text
    assert "latency_ms" in text


def test_a_table_of_another_device_predicts_and_is_not_checked(
    cli: Cli, search_args: list[object], table: Path, here: Path
) -> None:
    own = json.loads(table.read_text())
    own["device"]["name"] = "a phone"
    (here / "phone.json").write_text(json.dumps(own))
    flags = ["--constraint", "latency_ms <= 0.9x", *WORK, "--set", f"workload.latency={here / 'phone.json'}"]
    answer = cli(*search_args, *flags, "--json")
    assert answer.code == 0, answer.err
    assert "latency" not in answer.json
    assert "latency is predicted for cpu, a phone, and was not measured here" in answer.err


def test_constraints_alone_centre_the_ladders_of_matrices(cli: Cli, tiny_model: Path) -> None:
    flags = ["inspect", tiny_model, "--pattern", "unstructured", "--json"]
    targeted = cli(*flags, "--target", 0.7).json
    bound = targeted["budget"]["params"]
    bounded = cli(*flags, "--constraint", f"params <= {bound}").json
    assert bounded["budget"] == targeted["budget"]
    assert [unit["kept"] for unit in bounded["units"]] == [unit["kept"] for unit in targeted["units"]]


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("latency_ms <= 5", "latency_ms: not known without a latency table. Make one with 'allocator latency --out"),
        ("kv_byte <= 5", "unknown figure 'kv_byte'; did you mean 'kv_bytes'?"),
        ("params < 5", "expected a bound such as 'params <= 0.5x'"),
        ("params <= 5 parsecs", "expected a bound such as 'params <= 0.5x'"),
        ("kv_bytes <= 3", "constraints: kv_bytes <= 3 is out of reach of the ladders, which span "),
        ("params <= 0.01x", "(held by what no unit holds "),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(
    refused: Callable[..., str], tiny_model: Path, bound: str, message: str
) -> None:
    assert message in refused("search", "--model", tiny_model, "--constraint", bound)


def test_what_is_no_table_is_refused(refused: Callable[..., str], tiny_model: Path, table: Path, here: Path) -> None:
    bound = ["--constraint", "latency_ms <= 0.5x"]
    flags = ["search", "--model", tiny_model, *bound, *WORK]
    assert "no such latency table" in refused(*flags, "--set", "workload.latency=gone.json")
    (here / "other.json").write_text("{}")
    assert "not a latency table" in refused(*flags, "--set", "workload.latency=other.json")
    other = ["--set", "workload.batch=2", "--set", f"workload.latency={table}"]
    assert "the table is for batch 1" in refused(*flags, *other)
    assert "no file can be written there" in refused("latency", "--model", tiny_model, "--out", here)
