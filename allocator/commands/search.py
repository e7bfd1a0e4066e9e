"""The whole line: a trained model goes in; a plan, a smaller checkpoint and its measured figures come out."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allocator.core.budget import Budget, fits
from allocator.core.costs import COSTS, from_units
from allocator.core.errors import UserError
from allocator.core.files import fingerprint, write_json
from allocator.core.journal import Journal
from allocator.core.latency import LatencyTable
from allocator.core.plan import Plan
from allocator.core.protocols import BEFORE, Outcome, Request
from allocator.evaluation.engine import EngineSpec, Execution, LocalEvaluator
from allocator.evaluation.latency import describe, measure
from allocator.model.data.examples import Examples
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.levels.store import LevelStore, StoreBuilder, open_store
from allocator.report import curves
from allocator.run.config import RunConfig
from allocator.run.directory import advanced, begun, check_folder, find_store, resumed, store_place
from allocator.run.job import TRAINING, Job, prepare, versions
from allocator.run.recorder import Recorder
from allocator.run.reporting import Reporter, Silent
from allocator.run.rounds import history, next_job
from allocator.searchers.hypervolume import Hypervolume
from allocator.searchers.study import Decision, Study, run_study

Figures = dict[str, float]

_WRITTEN_S = 0.5
"""The front is not written more often, however short the batches."""

_RARER = 10
"""Nor does writing it take more than one second of so many, however long the journal."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished search leaves.

    Attributes:
        folder: The run.
        plan: The chosen plan.
        summary: The content of ``result.json``.
    """

    folder: Path
    plan: Plan
    summary: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The pruned checkpoint."""
        return self.folder / "checkpoint"


def run_search(config: RunConfig, resume: bool = False, reporter: Reporter | None = None) -> Result:
    """Run the whole line for one configuration.

    Args:
        config: What to do.
        resume: Continue the run of this name; what it measured is not measured again.
        reporter: Hears about progress.

    Raises:
        UserError: An input is wrong. Nothing was written.
    """
    with Recorder(reporter or Silent()) as recorder:
        return _run(config, resume, recorder)


def _run(config: RunConfig, resume: bool, reporter: Recorder) -> Result:
    folder = config.folder
    check_folder(folder, resume)
    reporter.phase("checking")
    job = prepare(config, reporter.say)
    config = job.config
    if config.device == "cuda" and config.search.training:
        reporter.say("notice: GPUs sum gradients in an order of their own; the plan may differ by rounding")
    started = time.perf_counter()
    wall: dict[str, float] = {}
    with ExitStack() as locked, ExitStack() as opened:
        if resume:
            job, journal = resumed(job, reporter)
            locked.enter_context(journal)
        found = find_store(job)
        opened.enter_context(cluster(config, reporter))
        if not resume:
            journal = locked.enter_context(begun(job))
        reporter.begin(folder, len(journal))
        evaluator = opened.enter_context(evaluators(_spec(job), job.tokens, config, reporter))
        reporter.staff(evaluator)
        while True:
            decision = _round(job, evaluator, journal, found is None, wall, reporter)
            if config.search.is_last_round(job.round_number):
                break
            shutil.rmtree(folder / TRAINING, ignore_errors=True)
            job, before = next_job(job, decision), journal
            journal = locked.enter_context(advanced(job))
            before.close()
            found = find_store(job)
            evaluator.renew(_spec(job))
        with _timed(wall, "execute"):
            measured = _execute(job, folder, decision, evaluator, reporter)
        shutil.rmtree(folder / TRAINING, ignore_errors=True)
        plan = _plan(job, decision, measured)
        plan.save(folder / "plan.json")
        opened.close()  # nothing else shall run while latency is measured
        reporter.staff(None)
        with _timed(wall, "latency"):
            latency = _latency(job, decision, reporter)
        wall["total"] = time.perf_counter() - started
        summary = {**_summary(job, journal, decision, plan, measured, wall), **latency}
        write_json(folder / "result.json", summary)
        from allocator.report.page import write_report

        write_report(folder)
    return Result(folder, plan, summary)


@contextmanager
def cluster(config: RunConfig, reporter: Reporter) -> Iterator[None]:
    """Hold a connection to the Ray cluster that a configuration's workers run on, if it has workers."""
    if config.workers == 0:
        yield
        return
    from allocator.pool.cluster import connected

    with connected(config.workers, _demand(config), config.address, reporter.say):
        yield


def _demand(config: RunConfig) -> Any:
    """Return what each worker takes of its node."""
    from allocator.pool.cluster import Demand

    gpus = 0.0 if config.device == "cpu" else config.worker.gpus
    return Demand(config.threads, gpus, config.worker.resources)


@contextmanager
def evaluators(
    spec: EngineSpec, tokens: Mapping[str, np.ndarray | Examples], config: RunConfig, reporter: Reporter
) -> Iterator[Any]:
    """Yield an evaluator: in process for no workers, else a Ray pool, closed at the end."""
    if config.workers == 0:
        yield LocalEvaluator(spec, tokens, reporter.say)
        return
    from allocator.pool.dispatch import RayPool

    pool = RayPool(spec, tokens, config.workers, reporter.say, _demand(config))
    try:
        yield pool
    finally:
        pool.close()


def _spec(job: Job) -> EngineSpec:
    """Return what an engine of a round is made from."""
    return job.engine_spec(LevelStore(store_place(job)))


def _round(
    job: Job, evaluator: Any, journal: Journal, build: bool, wall: dict[str, float], reporter: Recorder
) -> Decision:
    """Search once, on a level store that is built first if need be."""
    with _timed(wall, "store"):
        if build:
            build_store(job, evaluator, reporter)
        else:
            reporter.say(f"level store {store_place(job)} fits and is reused")
    with _timed(wall, "search"):
        return _decide(job, evaluator, journal, reporter)


def _of_rounds(job: Job) -> str:
    """Return which round it is, if there are several."""
    return f" {job.round_number}/{job.config.search.rounds}" if job.config.search.rounds > 1 else ""


def build_store(job: Job, evaluator: Any, reporter: Reporter) -> None:
    """Build the level store, or what is missing of one that was begun."""
    reporter.phase(f"level store{_of_rounds(job)}", len(job.layout.blocks))
    place = store_place(job)
    if open_store(place, job.store_key) is not None:
        return  # another run has built it meanwhile
    builder = StoreBuilder(place, job.store_key)
    if job.inputs == "dense":
        evaluator.build(builder, builder.missing(job.space), reporter.step)
    else:
        calibration = job.engine_spec(None).calibration(job.tokens["calibration"], reporter.step, reporter.say)
        made = prune_on_pruned_inputs(calibration, job.along, every_level=True, known=builder, solve=evaluator.solve)
        builder.fill(made)
    builder.finish(unit.name for unit in job.space.units)


def _decide(job: Job, evaluator: Any, journal: Journal, reporter: Recorder) -> Decision:
    settings, folder = job.config.search, job.config.folder
    batches, objectives = itertools.count(1), job.config.objectives
    volume = Hypervolume(journal, curves.objectives(journal), settings.fidelities[-1]) if objectives else None

    def write_front() -> int:
        kept = {} if volume is None else {"hypervolume": volume.to_json()}
        front = curves.front(journal)
        write_json(folder / "front.json", {**front, **kept})
        return len(front["points"])

    def reached() -> dict[str, float]:
        if volume is not None:
            return {"hypervolume": volume.curve()[-1][-1]}
        within = [o.loss for o in curves.comparable(journal) if fits(job.space, o.request.allocation, job.budget)]
        return {f"best {curves.LOSSES[job.config.loss].split(',')[0]}": min(within)} if within else {}

    def write() -> str:
        """Write the front, and return how good it is, in words."""
        figures = reached()
        reporter.found(len(journal), write_front(), figures)
        return "".join(f", {name} {value:.4f}" for name, value in figures.items())

    due_s, shown = float("-inf"), ""

    def listen(outcomes: Sequence[Outcome]) -> None:
        nonlocal due_s, shown
        if (begun_s := time.monotonic()) >= due_s:
            shown = write()
            due_s = time.monotonic() + max(_WRITTEN_S, _RARER * (time.monotonic() - begun_s))
        reporter.step(next(batches), f"{len(journal)} evaluations{shown}")

    def phase(name: str) -> None:
        reporter.phase(f"{name}{_of_rounds(job)}", settings.num_batches if name == "search" else None)

    study = Study(
        space=job.space,
        budget=job.budget,
        objectives=objectives,
        settings=settings,
        seed=job.config.seed,
        selection_tokens=job.config.tokens.selection,
        at_knee=job.config.target is None,
        round=job.round,
    )
    decision = run_study(study, evaluator, journal, listen, phase)
    write()
    return decision


def _execute(job: Job, folder: Path, decision: Decision, evaluator: Any, reporter: Reporter) -> dict[str, Figures]:
    """Save, reload, count and measure: nothing removed, the baselines, the plan; two of them made the other way too."""
    other = "assembled" if job.recompute else "recomputed"
    named = {
        "dense": (job.space.dense, False),
        "uniform": (decision.uniform, job.recompute),
        "two_rate": (decision.two_rate, job.recompute),
        "searched": (decision.searched, job.recompute),
        f"uniform_{other}": (decision.uniform, not job.recompute),
        f"searched_{other}": (decision.searched, not job.recompute),
    }
    reporter.phase("executing")
    # what a worker still writes after an error, a resume clears away
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
    return {**executed, **_trained(job, decision, evaluator)}


def _trained(job: Job, decision: Decision, evaluator: Any) -> dict[str, Figures]:
    """Measure uniform and the plan after training on held-out text, where the search trained its candidates.

    No checkpoint is saved: the plan's is executed without training.
    """
    settings = job.config.search
    if not settings.training:
        return {}
    named = {"uniform_trained": decision.uniform, "searched_trained": decision.searched}
    requests = {name: Request(a, job.config.tokens.test, "test", settings.training) for name, a in named.items()}
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


def _latency(job: Job, decision: Decision, reporter: Reporter) -> dict[str, Any]:
    """Measure what was looked up: whole models of the shapes of the dense one, uniform and the plan, end to end.

    Returns:
        Under ``latency``, for each of them and each figure, ``predicted`` and ``measured`` milliseconds; nothing where
        there is no table, or it is of another device.
    """
    if job.config.workload.latency is None or job.space.pattern != "structured":
        return {}
    table, device = LatencyTable.load(job.config.workload.latency), job.config.device
    if table.device != describe(device):
        there, here = (", ".join(each.values()) for each in (table.device, describe(device)))
        reporter.say(f"notice: latency is predicted for {there}, and was not measured here, on {here}")
        return {}
    named = {"dense": job.space.dense, "uniform": decision.uniform, "searched": decision.searched}
    reporter.phase("latency", len(named))
    shapes = [{u.name: u.kept[level] for u, level in zip(job.space.units, a, strict=True)} for a in named.values()]
    found = {}
    for (name, allocation), figures in zip(
        named.items(), measure(job.checkpoint, job.layout, shapes, table.settings, device, reporter.step), strict=True
    ):
        found[name] = {
            figure: {
                "predicted": round(from_units(figure, job.space.cost(allocation, figure)), 6),
                "measured": round(milliseconds, 6),
            }
            for figure, milliseconds in figures.items()
        }
    return {"latency": found}


def _plan(job: Job, decision: Decision, measured: Mapping[str, Figures]) -> Plan:
    reached = {cost: job.space.cost(decision.searched, cost) for cost in job.config.objectives if cost in COSTS}
    return Plan(
        model=job.model_id,
        space=job.space,
        allocation=decision.searched,
        budget=Budget(**{**job.budget.limits, **reached}),
        pruner=job.pruner_id,
        measured=measured,
        provenance={
            "run": fingerprint(job.identity()),
            "searcher": job.config.search.method,
            "seed": job.config.seed,
            **({} if job.config.target is None else {"target": job.config.target}),
            "workload": job.workload_id,
            **job.training_id,
            "versions": versions(),
        },
    )


def _summary(
    job: Job,
    journal: Journal,
    decision: Decision,
    plan: Plan,
    measured: Mapping[str, Figures],
    wall: Mapping[str, float],
) -> dict[str, Any]:
    space, rounds = job.space, history(job, decision)
    named = {"uniform": decision.uniform, "two_rate": decision.two_rate, "searched": decision.searched}
    units = [
        {
            "name": unit.name,
            "part": unit.part,
            "kind": unit.kind,
            "block": unit.block,
            "sparsity": {name: round(unit.sparsity(a[index]), 6) for name, a in named.items()},
        }
        for index, unit in enumerate(space.units)
    ]
    return {
        "schema": 3,
        "kind": "allocator.result",
        "model": dict(plan.model),
        "pattern": space.pattern,
        "asked": job.config.asked,
        "target": job.target,
        "method": job.config.search.method,
        "seed": job.config.seed,
        "budget": plan.to_json()["budget"],
        "measured": {name: dict(figures) for name, figures in measured.items()},
        "units": units,
        "search": {
            **rounds[-1],
            "evaluations": sum(line["evaluations"] for line in rounds),
            "candidate_tokens": sum(line["candidate_tokens"] for line in rounds),
            "store_tokens": int(job.tokens["calibration"].size) * len(rounds),
            "rounds": list(rounds),
            **({"training": curves.training(journal)} if job.config.search.training else {}),
        },
        "wall_s": {name: round(seconds, 2) for name, seconds in wall.items()},
        "tokens": {split: int(ids.size) for split, ids in job.tokens.items()},
        "versions": versions(),
    }


@contextmanager
def _timed(wall: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    wall[name] = wall.get(name, 0.0) + time.perf_counter() - start
