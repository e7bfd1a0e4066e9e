"""From a decision to checkpoints: baselines and the plan are executed, saved, reloaded, counted and measured."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from allocator.core.costs import from_units
from allocator.core.errors import UserError
from allocator.core.latency import LatencyTable
from allocator.core.protocols import BEFORE, Request
from allocator.core.results import Figures
from allocator.evaluation.latency import describe, measure
from allocator.evaluation.spec import Evaluator, Execution
from allocator.run.job import Job
from allocator.run.reporting import Reporter
from allocator.searchers.study import Decision


def execute_decision(job: Job, decision: Decision, evaluator: Evaluator, reporter: Reporter) -> dict[str, Figures]:
    """Execute the dense model, the baselines and the plan, and keep the plan's checkpoint in the run's folder.

    Uniform and the plan are executed in both ways: along their own path, and from the level store.
    """
    folder, other = job.config.folder, "assembled" if job.recompute else "recomputed"
    named = {
        "dense": (job.space.dense, False),
        "uniform": (decision.uniform, job.recompute),
        "two_rate": (decision.two_rate, job.recompute),
        "searched": (decision.searched, job.recompute),
        f"uniform_{other}": (decision.uniform, not job.recompute),
        f"searched_{other}": (decision.searched, not job.recompute),
    }
    reporter.start_phase("executing")
    # a resume removes what a worker still writes after an error
    with tempfile.TemporaryDirectory(prefix=".executing-", dir=folder, ignore_cleanup_errors=True) as scratch:
        executions = [
            Execution(allocation, recompute, Path(scratch).absolute() / name)
            for name, (allocation, recompute) in named.items()
        ]
        figures = evaluator.execute(executions, job.config.tokens.test)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (Path(scratch) / "searched").rename(folder / "checkpoint")
    executed = {
        name: {"params": measured.pop("params"), "sparsity": round(job.space.sparsity(allocation), 6), **measured}
        for (name, (allocation, _)), measured in zip(named.items(), figures, strict=True)
    }
    return {**executed, **_measure_trained(job, decision, evaluator)}


def _measure_trained(job: Job, decision: Decision, evaluator: Evaluator) -> dict[str, Figures]:
    """Measure uniform and the plan on the test split after training, if the search trained its candidates.

    No trained checkpoint is saved: the plan is executed without training.
    """
    settings = job.config.search
    if not settings.training:
        return {}
    named = {"uniform_trained": decision.uniform, "searched_trained": decision.searched}
    requests = {
        name: Request(allocation=a, tokens=job.config.tokens.test, split="test", training=settings.training)
        for name, a in named.items()
    }
    outcomes = {o.request: o for o in evaluator.evaluate(list(dict.fromkeys(requests.values())))}
    if failed := next((outcome.failed for outcome in outcomes.values() if outcome.failed), ""):
        raise UserError(f"evaluation: a trained model cannot be measured: {failed}. Free some memory, then resume")
    return {
        name: {
            "params": job.space.cost(request.allocation),
            "sparsity": round(job.space.sparsity(request.allocation), 6),
            **{key: value for key, value in outcomes[request].measured.items() if not key.endswith(BEFORE)},
            "perplexity": math.exp(outcomes[request].measured["nll"]),
        }
        for name, request in requests.items()
    }


def measure_latencies(job: Job, decision: Decision, reporter: Reporter) -> dict[str, Any]:
    """Measure whole models end to end, in the shapes of the dense model, uniform and the plan.

    Returns:
        Under ``latency``, for each model and each figure, ``predicted`` and ``measured`` milliseconds. Empty if the run
        has no latency table, or the table is of another device.
    """
    if job.config.workload.latency is None or job.space.pattern != "structured":
        return {}
    table, device = LatencyTable.load(job.config.workload.latency), job.config.device
    if table.device != describe(device):
        there, here = (", ".join(each.values()) for each in (table.device, describe(device)))
        reporter.notify(f"notice: latency is predicted for {there}, and was not measured here, on {here}")
        return {}
    named = {"dense": job.space.dense, "uniform": decision.uniform, "searched": decision.searched}
    reporter.start_phase("latency", len(named))
    shapes = [{u.name: u.kept[level] for u, level in zip(job.space.units, a, strict=True)} for a in named.values()]
    measured = measure(job.checkpoint, job.layout, shapes, table.settings, device, reporter.advance)
    latencies = {
        name: {
            figure: {
                "predicted": round(from_units(figure, job.space.cost(allocation, figure)), 6),
                "measured": round(milliseconds, 6),
            }
            for figure, milliseconds in figures.items()
        }
        for (name, allocation), figures in zip(named.items(), measured, strict=True)
    }
    return {"latency": latencies}
