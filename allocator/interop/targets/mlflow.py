"""MLflow: a search as a run, and the members of its front as nested runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from allocator.core.costs import known_costs
from allocator.core.errors import UserError
from allocator.core.files import write_json
from allocator.core.journal import Journal
from allocator.core.outcomes import read_front
from allocator.core.space import SearchSpace
from allocator.core.spending import trace_convergence
from allocator.interop.contract import Source
from allocator.interop.searches import SearchTarget, require_run
from allocator.interop.writing import format_command

STORE, ARTIFACTS = "mlflow.db", "artifacts"

_BATCH = 1000
"""Number of metrics that MLflow takes at once."""

_BEGIN_MS = 1
"""The time of every entry: our runs have no dates, and MLflow takes 0 for no date."""


class MLflow(SearchTarget):
    """Writes an SQLite store with the search as one run, and a nested run for every member of the front.

    The parameters of the search are its settings and the reference point of the hypervolume. Its metrics are the
    hypervolume by the number of evaluations, and the measurements of the plan. A search at one budget without a front
    has the best loss by candidate-tokens in place of the hypervolume. Members have their figures and costs, and their
    levels of every unit. Other evaluations are in the run's journal, and in exports to ``optuna``.

    MLflow draws the ids of runs at random, so the store differs with every export. Its times are fixed, and its paths
    are relative to the folder.
    """

    name = "mlflow"
    writes = "a search with its front, as MLflow's SQLite store"
    varies = (STORE, f"{ARTIFACTS}/**")

    def check(self, source: Source) -> None:
        """Check that there is a search, and that MLflow is installed.

        Raises:
            UserError: One of these is missing.
        """
        super().check(source)
        if find_spec("mlflow") is None:
            raise UserError("export: mlflow is not installed. Add it with pip install 'allocator[mlflow]'")

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the store."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        run = require_run(source)
        front = read_front(run / "front.json")
        # MLflow keeps a connection per path of a store, so this store is written at a new path
        with tempfile.TemporaryDirectory(dir=folder.absolute()) as scratch:
            _log_search(source, Journal.read(run / "journal.jsonl"), front, Path(scratch))
            _fix_paths_and_times(Path(scratch))
            for name in (STORE, ARTIFACTS):
                shutil.move(Path(scratch) / name, folder / name)
        show = format_command("mlflow", "ui", "--backend-store-uri", f"sqlite:///{STORE}")
        return [
            f"1 search and {len(front['points'])} members of its front; a run keeps no dates, so all have the same",
            f"next: in the folder, {show}",
        ]


TARGET = MLflow()


def _log_search(source: Source, journal: Journal, front: Mapping[str, Any], scratch: Path) -> None:
    import mlflow
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = mlflow.MlflowClient(f"sqlite:///{scratch / STORE}")
    experiment = client.create_experiment(journal.header.model["id"], str(scratch / ARTIFACTS))

    def log(name: str, tags: Mapping[str, str], parameters: Mapping[str, Any], metrics: Sequence[Any]) -> str:
        made = client.create_run(experiment, start_time=_BEGIN_MS, run_name=name, tags=dict(tags))
        run: str = made.info.run_id
        client.log_batch(run, params=[mlflow.entities.Param(key, str(value)) for key, value in parameters.items()])
        entries = [mlflow.entities.Metric(key, float(value), _BEGIN_MS, step) for key, value, step in metrics]
        for start in range(0, len(entries), _BATCH):
            client.log_batch(run, metrics=entries[start : start + _BATCH])
        client.set_terminated(run, end_time=_BEGIN_MS)
        return run

    folder = require_run(source)
    search = log(
        folder.absolute().name, {}, _list_parameters(journal, front), [*_iterate_metrics(journal, front, source)]
    )
    for name in ("plan.json", "front.json"):
        client.log_artifact(search, str(folder / name))
    space, planned = journal.space, (source.plan.space, source.plan.allocation)
    for number, point in enumerate(front["points"]):
        allocation = tuple(point["allocation"])
        tags = {MLFLOW_PARENT_RUN_ID: search, "plan": json.dumps((space, allocation) == planned)}
        figures = [(name, value, 0) for name, value in point.items() if name != "allocation"]
        member = log(f"member {number}", tags, {}, figures)
        write_json(scratch / "allocation.json", _list_units(space, allocation))
        client.log_artifact(member, str(scratch / "allocation.json"))


def _list_parameters(journal: Journal, front: Mapping[str, Any]) -> dict[str, Any]:
    header = journal.header
    points = {name: front.get("hypervolume", {}).get(name, {}) for name in ("ideal", "reference")}
    return {
        **{key: getattr(header, key) for key in ("asked", "method", "seed", "loss")},
        "pattern": journal.space.pattern,
        "pruner": header.pruner["name"],
        "objectives": ", ".join(front["objectives"]),
        "tokens": front["tokens"],
        **{f"{name}.{key}": value for name, point in points.items() for key, value in point.items()},
    }


def _iterate_metrics(journal: Journal, front: Mapping[str, Any], source: Source) -> Iterator[tuple[str, float, int]]:
    """Yield metrics of the search: name, value and step."""
    if "hypervolume" in front:
        for evaluations, tokens, volume in front["hypervolume"]["curve"]:
            yield "hypervolume", volume, evaluations
            yield "candidate_tokens", tokens, evaluations
    else:
        for spent, best in trace_convergence(journal):
            yield f"best_{journal.loss}", best, round(spent)
    for name, figures in source.plan.measured.items():
        yield from ((f"{name}.{key}", value, 0) for key, value in figures.items())


def _list_units(space: SearchSpace, allocation: Sequence[int]) -> dict[str, Any]:
    return {
        unit.name: {
            "level": level,
            "kept": unit.kept[level],
            "total": unit.total,
            **{cost: unit.costs(cost)[level] for cost in known_costs(space)},
        }
        for unit, level in zip(space.units, allocation, strict=True)
    }


def _fix_paths_and_times(scratch: Path) -> None:
    """Make paths relative, and set the times that MLflow chooses itself."""
    with closing(sqlite3.connect(scratch / STORE, isolation_level=None)) as store:
        store.execute("UPDATE experiments SET creation_time = ?, last_update_time = ?", (_BEGIN_MS, _BEGIN_MS))
        store.execute("UPDATE experiments SET artifact_location = ?", (ARTIFACTS,))
        store.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, ?, '')", (f"{scratch}/",))
        store.execute("VACUUM")  # until then the file contains the overwritten values
