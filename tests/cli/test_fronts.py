"""Searches of fronts, and the choice of a plan from what a run measured."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import allocator
from allocator.core.budget import Budget
from allocator.core.journal import Journal
from allocator.core.outcomes import find_front, select_comparable
from allocator.core.plan import Plan
from allocator.run.config.load import load_config
from allocator.searchers.methods.sweep import make_budgets
from allocator.searchers.rules.baselines import uniform

Cli = Callable[..., Any]
SMALL = {
    "tokens.sequence_length": 64,
    "tokens.calibration": 512,
    "tokens.selection": 256,
    "tokens.test": 512,
    "workload.prompt": 48,
    "workload.generate": 16,
    "search.tokens": [64, 128],
    "search.sweep.points": 8,
    "search.sweep.entrants": 3,
    "search.nsga.generations": 3,
    "search.nsga.population": 8,
    "search.nsga.profile": 64,
    "search.nsga.tokens": 128,
    "search.emo_pms.rounds": 2,
    "search.emo_pms.generations": 2,
    "search.emo_pms.population": 6,
    "search.emo_pms.schemes": 4,
    "search.emo_pms.profile": 64,
    "search.emo_pms.tokens": 128,
    "search.tpe.trials": 24,
    "search.tpe.tokens": 128,
    "search.gp.trials": 18,
    "search.gp.tokens": 128,
}
OBJECTIVES = ["params", "kv_bytes"]


def _search(model: Path, text: Path, runs: Path, name: str, **more: Any) -> Path:
    settings = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    common: dict[str, Any] = {"objectives": OBJECTIVES, "workers": 0, "text": text, "runs_dir": runs}
    return allocator.search(model, name=name, settings=settings, **{**common, **more}).folder


@pytest.fixture(scope="module")
def swept(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of a front. Read only."""
    return _search(tiny_model, text_folder, tmp_path_factory.mktemp("fronts"), "swept", method="sweep")


@pytest.fixture
def own(swept: Path, here: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(swept, here / "run"))


def _beats(one: Mapping[str, float], other: Mapping[str, float], names: list[str]) -> bool:
    pairs = [(one[name], other[name]) for name in names]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def test_the_front_is_non_dominated_complete_and_selected(swept: Path) -> None:
    front = json.loads((swept / "front.json").read_text())
    names = ["kl", *OBJECTIVES]
    assert front["objectives"] == names
    assert not any(_beats(*pair, names) for pair in itertools.permutations(front["points"], 2))
    journal = Journal.read(swept / "journal.jsonl")
    space = journal.space
    for outcome in select_comparable(journal):
        allocation = outcome.request.allocation
        figures = {"kl": outcome.loss, **{cost: space.cost(allocation, cost) for cost in OBJECTIVES}}
        same = [point for point in front["points"] if all(point[name] == figures[name] for name in names)]
        assert same or any(_beats(point, figures, names) for point in front["points"])
    assert sum("selection" in point for point in front["points"]) >= 3
    assert len({point["kv_bytes"] for point in front["points"]}) >= 3


def test_the_hypervolume_is_kept_against_a_stated_point(swept: Path) -> None:
    kept, journal = json.loads((swept / "front.json").read_text())["hypervolume"], Journal.read(swept / "journal.jsonl")
    space, begun = journal.space, journal.batches[0]
    assert {outcome.request.allocation for outcome in begun} == {
        uniform(space, budget) for budget in make_budgets(space, Budget(params=space.cost(space.dense)), ["params"], 3)
    }
    assert kept["reference"] == {
        "kl": max(outcome.loss for outcome in begun),
        **{cost: space.cost(space.dense, cost) for cost in OBJECTIVES},
    }
    assert kept["ideal"] == {"kl": 0.0, **{cost: space.cost(space.sparsest, cost) for cost in OBJECTIVES}}
    assert len(kept["curve"]) == len(journal.batches)
    counts, tokens, volumes = zip(*kept["curve"], strict=True)
    search = json.loads((swept / "result.json").read_text())["search"]
    assert (counts[-1], tokens[-1]) == (search["evaluations"], search["candidate_tokens"])
    assert list(volumes) == sorted(volumes)
    assert 0.0 < volumes[0] < volumes[-1] == kept["value"] < 1.0


def test_the_plan_is_a_member_and_is_executed_beside_baselines_of_its_costs(swept: Path) -> None:
    plan, result = Plan.load(swept / "plan.json"), json.loads((swept / "result.json").read_text())
    journal = Journal.read(swept / "journal.jsonl")
    assert plan.allocation in {outcome.request.allocation for outcome in find_front(journal)}
    assert {cost: plan.budget.limits[cost] for cost in OBJECTIVES} == {
        cost: plan.space.cost(plan.allocation, cost) for cost in OBJECTIVES
    }
    assert result["measured"]["uniform"]["params"] <= result["measured"]["searched"]["params"]
    assert result["asked"] == "front of params and kv_bytes"
    assert "front of params and kv_bytes" in (swept / "report.html").read_text()


def test_front_as_table_lines_and_picture(swept: Path, cli: Cli, here: Path) -> None:
    answer = cli("front", swept)
    assert answer.code == 0, answer.err
    assert "kv_bytes" in answer.out
    data = cli("front", swept, "--json").json
    kept = data["hypervolume"]
    assert re.search(
        rf"hypervolume {kept['value']:.4f} after {kept['curve'][-1][0]} evaluations; reference point: "
        rf"kl {kept['reference']['kl']:.4f}, params {kept['reference']['params']:,}, kv_bytes ",
        answer.out,
    )
    rows = list(csv.DictReader(io.StringIO(cli("front", swept, "--csv").out)))
    assert [int(row["index"]) for row in rows] == list(range(len(data["points"])))
    for row, point in zip(rows, data["points"], strict=True):
        assert float(row["kl"]) == point["kl"]
        assert int(row["kv_bytes"]) == point["kv_bytes"]
    assert cli("front", swept, "--plot", here / "front.svg").code == 0
    assert (here / "front.svg").read_text().startswith("<?xml")


def test_any_member_becomes_a_plan(swept: Path, cli: Cli, here: Path) -> None:
    points = cli("front", swept, "--json").json["points"]
    for index in (0, len(points) // 2, len(points) - 1):
        assert cli("plan", swept, "--index", index, "--out", here / "plan.json").code == 0
        plan = Plan.load(here / "plan.json")
        assert list(plan.allocation) == points[index]["allocation"]
    middle = points[len(points) // 2]["kv_bytes"]
    found = cli("plan", swept, "--where", f"kv_bytes <= {middle}", "--json").json
    least = min(point["kl"] for point in points if point["kv_bytes"] <= middle)
    assert found["measured"]["search_split"]["kl"] == least
    bound = ["--where", f"kl <= {points[-2]['kl']}"]
    smallest = cli("plan", swept, *bound, "--best", "params", "--json").json["costs"]["params"]["achieved"]
    assert smallest == min(point["params"] for point in points if point["kl"] <= points[-2]["kl"])
    knee = cli("plan", swept, "--knee", "--json").json
    assert knee["costs"]["params"]["achieved"] in {point["params"] for point in points}


def test_choices_that_make_no_sense_are_refused(own: Path, refused: Callable[..., str], cli: Cli) -> None:
    count = len(cli("front", own, "--json").json["points"])
    assert f"has members 0 to {count - 1}, and 99 was asked for" in refused("plan", own, "--index", 99)
    assert "keeps kv_bytes <= 3; the least kv_bytes among them is " in refused("plan", own, "--where", "kv_bytes <= 3")
    assert "unknown figure 'kv_byte'; did you mean 'kv_bytes'?" in refused("plan", own, "--best", "kv_byte")
    assert "--index, --knee and --best exclude each other" in refused("plan", own, "--index", 1, "--knee")
    assert "unknown figure 'speed'" in refused("plan", own, "--where", "speed <= 3")


@pytest.mark.parametrize("method", ["nsga2", "nsga3", "tpe", "gp"])
def test_other_methods_find_fronts(method: str, tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    folder = _search(tiny_model, text_folder, tmp_path, method, method=method, target=0.3)
    plan, front = Plan.load(folder / "plan.json"), json.loads((folder / "front.json").read_text())
    assert len(front["points"]) >= 3
    assert plan.space.cost(plan.allocation) <= plan.space.limit_for(0.3)


@pytest.mark.parametrize(
    "method", ["sweep", "auto", *(pytest.param(m, marks=pytest.mark.slow) for m in ("nsga2", "tpe"))]
)
def test_killed_and_resumed_to_the_same_front(
    method: str, swept: Path, tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    whole = swept if method == "sweep" else _search(tiny_model, text_folder, tmp_path, "whole", method=method)
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (2, len(lines) // 2, len(lines) - 1):
        folder = tmp_path / f"cut{kept}"
        shutil.copytree(whole, folder)
        for name in ("plan.json", "result.json", "front.json", "report.html"):
            (folder / name).unlink()
        shutil.rmtree(folder / "checkpoint")
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
        again = _search(tiny_model, text_folder, tmp_path, folder.name, method=method, resume=True)
        assert (again / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
        assert (again / "front.json").read_bytes() == (whole / "front.json").read_bytes()


def test_methods_of_one_objective_refuse_several(refused: Callable[..., str], tiny_model: Path) -> None:
    flags = ["search", "--model", tiny_model]
    assert "thompson serves the loss alone. Use --method sweep or nsga2" in refused(
        *flags, "--objective", "params", "--method", "thompson"
    )
    assert "nsga2 finds a front, and nothing is an objective" in refused(*flags, "--method", "nsga2")
    assert "objectives: unknown 'size'" in refused(*flags, "--objective", "size")
    assert "search.rounds: a front is searched in one round" in refused(
        *flags, "--objective", "params", "--set", "search.rounds=2"
    )
    assert "latency_ms: not known without a latency table" in refused(*flags, "--objective", "latency_ms")


@pytest.mark.parametrize(
    ("objectives", "method"),
    [(["params"], "sweep"), (["params", "kv_bytes"], "emo_pms"), (["params", "nll"], "nsga2"), ([], "auto")],
)
def test_auto_is_what_serves_best(objectives: list[str], method: str) -> None:
    assert load_config(None, {"objectives": objectives}).search.method == method
    assert load_config(None, {"objectives": ["params"]}, ["search.method=nsga3"]).search.method == "nsga3"


@pytest.mark.parametrize("method", ["nsga2", "emo_pms"])
def test_no_member_is_above_a_bound_though_all_is_measured_in_full(
    method: str, tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Profiles look beyond the bound; on all tokens they could pass for members."""
    settings = [f"search.{name}.{key}=128" for name in ("nsga", "emo_pms") for key in ("profile", "tokens")]
    given = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    common: dict[str, Any] = {"objectives": ["params"], "constraints": ["kv_bytes <= 0.4x"], "text": text_folder}
    run = allocator.search(
        tiny_model, name="run", method=method, workers=0, runs_dir=tmp_path, settings=[*given, *settings], **common
    ).folder
    limit = Journal.read(run / "journal.jsonl").header.budget.limits["kv_bytes"]
    points = json.loads((run / "front.json").read_text())["points"]
    assert points
    assert all(point["kv_bytes"] <= limit for point in points)
    chosen = allocator.open_run(run).plan(knee=True)
    assert chosen.space.cost(chosen.allocation, "kv_bytes") <= limit
