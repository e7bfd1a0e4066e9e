"""Searches, read back by Optuna, optuna-dashboard and MLflow."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import allocator as api
from allocator.core.budget import fits
from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.outcomes import select_comparable
from allocator.core.plan import Plan
from allocator.interop.contract import check_target
from allocator.interop.targets.mlflow import MLflow
from allocator.interop.targets.optuna import Optuna

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "runs" / "reference"


def storage(folder: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))


@pytest.fixture
def exported(searched: Path, tiny_model: Path, tmp_path: Path) -> Path:
    api.export(searched, "optuna", tmp_path / "out", model=tiny_model)
    return tmp_path / "out"


def test_optuna_loads_every_evaluation(exported: Path, searched: Path) -> None:
    journal = Journal.read(searched / "journal.jsonl")
    study = optuna.load_study(study_name="searched", storage=storage(exported))
    outcomes = [outcome for batch in journal.batches for outcome in batch]
    assert len(study.trials) == len(outcomes) > 20
    assert study.metric_names == ["kl", "params"]
    space = journal.space
    for trial, outcome in zip(study.trials, outcomes, strict=True):
        assert tuple(trial.params[unit.name] for unit in space.units) == outcome.request.allocation
        assert [d.high for d in trial.distributions.values()] == [unit.num_levels - 1 for unit in space.units]
        assert (trial.user_attrs["tokens"], trial.user_attrs["split"]) == (
            outcome.request.tokens,
            outcome.request.split,
        )
        assert trial.user_attrs["params"] == space.cost(outcome.request.allocation)
        if trial.state == TrialState.COMPLETE:
            assert trial.values == [outcome.measured["kl"], space.cost(outcome.request.allocation)]
        assert (trial.datetime_complete - trial.datetime_start).total_seconds() == pytest.approx(outcome.wall_s)
    complete = {o.request.key for o in select_comparable(journal)}
    states = [TrialState.COMPLETE if o.request.key in complete else TrialState.PRUNED for o in outcomes[:-1]]
    assert [t.state for t in study.trials] == [*states, TrialState.FAIL]
    assert TrialState.PRUNED in states
    assert study.trials[-1].user_attrs["failed"] == "3 workers died"


def test_optuna_finds_the_front_that_is_marked(exported: Path, searched: Path) -> None:
    study = optuna.load_study(study_name="searched", storage=storage(exported))
    marked = {trial.user_attrs["front"]: trial for trial in study.trials if "front" in trial.user_attrs}
    points = json.loads((searched / "front.json").read_text())["points"]
    assert [[*marked[n].params.values()] for n in range(len(points))] == [point["allocation"] for point in points]
    assert sorted(t.values for t in study.best_trials) == sorted(t.values for t in marked.values())
    plan = Plan.load(searched / "plan.json")
    assert [tuple(t.params.values()) for t in study.trials if "plan" in t.user_attrs] == [plan.allocation]


def test_optuna_has_a_study_of_every_round_and_its_best_keeps_the_budget(tmp_path: Path) -> None:
    api.export(REFERENCE, "optuna", tmp_path / "out", model="tiny-python-llama")
    names = optuna.get_all_study_names(storage(tmp_path / "out"))
    assert names == ["reference, round 1", "reference"]
    for name, path in zip(names, ("rounds/1/journal.jsonl", "journal.jsonl"), strict=True):
        journal = Journal.read(REFERENCE / path)
        study = optuna.load_study(study_name=name, storage=storage(tmp_path / "out"))
        assert study.metric_names == ["kl"]
        budget = journal.header.budget
        losses = [o.loss for o in select_comparable(journal) if fits(journal.space, o.request.allocation, budget)]
        assert study.best_trial.value == min(losses)
        assert study.user_attrs["asked"] == journal.header.asked


@pytest.mark.parametrize("target", [Optuna(), MLflow()], ids=["optuna", "mlflow"])
def test_a_plan_alone_shows_no_search(target: Any, structured: Any) -> None:
    with pytest.raises(UserError, match=f"{target.name} shows a search, and this is only a plan. Name the folder"):
        check_target(target, structured.source)


def test_mlflow_is_asked_for_where_it_is_missing(
    searched: Path, structured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    source = structured.source
    with pytest.raises(UserError, match=r"mlflow is not installed. Add it with pip install 'allocator\[mlflow\]'"):
        check_target(MLflow(), replace(source, run=searched))


@pytest.fixture
def dashboard(exported: Path) -> Iterator[str]:
    """The address of optuna-dashboard on what was exported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = ROOT / ".consumers" / "trackers" / "bin" / "optuna-dashboard"
    command = [program, "study.log", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=exported, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.consumers
def test_optuna_dashboard_shows_the_study(dashboard: str, searched: Path) -> None:
    def get(path: str) -> Any:
        with urllib.request.urlopen(f"{dashboard}/api/{path}", timeout=60) as answer:
            return json.load(answer)

    end_s = time.monotonic() + 120
    while True:
        try:
            studies = get("studies")["study_summaries"]
            break
        except OSError:
            assert time.monotonic() < end_s
            time.sleep(0.5)
    assert [study["study_name"] for study in studies] == ["searched"]
    detail = get(f"studies/{studies[0]['study_id']}?after=0")
    journal = Journal.read(searched / "journal.jsonl")
    assert len(detail["trials"]) == sum(map(len, journal.batches))
    assert {trial["state"] for trial in detail["trials"]} == {"Complete", "Pruned", "Fail"}
    assert len(detail["best_trials"]) == len(json.loads((searched / "front.json").read_text())["points"])


EXPORT = """
import site, sys
site.addsitedir(sys.argv[1])  # what allocator needs, behind what the environment has
import allocator as api
for out in ("one", "two"):
    print(*api.export(sys.argv[2], "mlflow", out, model=sys.argv[3]), sep="\\n")
"""

READ = """
import json, sys
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db")
experiment, = (e for e in client.search_experiments() if e.name != "Default")
runs = client.search_runs([experiment.experiment_id], max_results=1000)
found = []
for run in runs:
    files = {f.path: Path(client.download_artifacts(run.info.run_id, f.path)).read_text()
             for f in client.list_artifacts(run.info.run_id)}
    history = {key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
               for key in run.data.metrics}
    found.append({"id": run.info.run_id, "name": run.info.run_name, "parent": run.data.tags.get("mlflow.parentRunId"),
        "plan": run.data.tags.get("plan"), "status": run.info.status, "start": run.info.start_time,
        "end": run.info.end_time, "params": run.data.params, "metrics": history, "files": files})
print(json.dumps({"experiment": experiment.name, "runs": found}))
"""


@pytest.mark.consumers
def test_mlflow_reads_the_store_back(
    searched: Path, tiny_model: Path, consumer: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "export.py").write_text(EXPORT)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    consumer("trackers", tmp_path, "python", "export.py", packages, searched, tiny_model)
    read = []
    for out in ("one", "two"):
        (tmp_path / "read.py").write_text(READ)
        moved = Path(shutil.move(tmp_path / out, tmp_path / f"{out}-moved"))
        assert str(tmp_path).encode() not in (moved / "mlflow.db").read_bytes()
        read.append(json.loads(consumer("trackers", moved, "python", "../read.py")))
    front = json.loads((searched / "front.json").read_text())
    for store in read:
        by_name = {run["name"]: run for run in store["runs"]}
        search = by_name.pop("searched")
        curve = [(evaluations, volume) for evaluations, _, volume in front["hypervolume"]["curve"]]
        assert [tuple(each) for each in search["metrics"]["hypervolume"]] == curve
        for name, value in front["hypervolume"]["reference"].items():
            assert search["params"][f"reference.{name}"] == str(value)
        assert json.loads(search["files"]["plan.json"]) == json.loads((searched / "plan.json").read_text())
        assert len(by_name) == len(front["points"])
        for number, point in enumerate(front["points"]):
            member = by_name[f"member {number}"]
            assert (member["parent"], member["status"]) == (search["id"], "FINISHED")
            figures = {name: value for name, value in point.items() if name != "allocation"}
            assert {name: value for name, [(_, value)] in member["metrics"].items()} == pytest.approx(figures)
            units = json.loads(member["files"]["allocation.json"])
            assert [unit["level"] for unit in units.values()] == point["allocation"]
        assert [run["plan"] for run in by_name.values()].count("true") == 1
    # but for the names that MLflow draws, the same again
    names = [{run["id"]: run["name"] for run in store["runs"]} for store in read]
    for store, name in zip(read, names, strict=True):
        store["runs"] = sorted(
            ({**run, "id": None, "parent": name.get(run["parent"])} for run in store["runs"]), key=lambda r: r["name"]
        )
    assert read[0] == read[1]
