"""How evaluation scales: on two cores for real, and on many simulated workers.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --part real
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --part driver
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --part simulated --workers 8 64 128
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --part lag
    python -m benchmarks.scaling

`real`: offspring of the uniform allocation of the packaged model, measured in process, by one worker and by two, in
turns. `driver`: CPU time of the driver for each evaluation of batches of 64, where workers answer at once. `simulated`:
a real driver, a real journal and real searchers on a Ray cluster of eight nodes, whose workers wait a drawn time in
place of computing. `lag`: what a search for so many candidate-tokens finds by generations and by lags, on the packaged
model, in process. Each part leaves its lines in `results/scaling.json`; without a part, tables and figure are made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from allocator.core.budget import Budget
from allocator.core.effort import Limit
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import SearchSpace, Unit
from allocator.evaluation.local import LocalEvaluator
from allocator.evaluation.spec import EngineSpec
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.pool.dispatch import RayPool
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.levels.store import StoreBuilder
from allocator.run.config.load import load_config
from allocator.run.job import Job
from allocator.run.prepare import prepare_job
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.evolution import EvolutionSettings, ExchangeEvolution, exchange
from allocator.searchers.methods.steady import SteadyEvolution, SteadySettings
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from benchmarks.waiter import TOKENS, Waiter

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BATCH = 64
REPEATS = 7
LIMIT = Limit(400_000, "tokens")
NODES = 8
SPREAD, STRAGGLERS = 0.3, 0.01
ROUNDS = 32
"""Evaluations of a simulated search, for each worker."""


# real workers


def offspring(job: Job, count: int, tokens: int, seed: int) -> list[Request]:
    """Return children of the uniform allocation, as evolution proposes them."""
    parent, rng = uniform(job.space, job.budget), np.random.default_rng(seed)
    children = {exchange(job.space, parent, job.budget, rng, 2): None for _ in range(4 * count)}
    return [Request(allocation=child, tokens=tokens) for child in list(children)[:count]]


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Job, EngineSpec]]:
    """Yield the packaged model's job at half of its units, and what an engine on a level store of it is made from."""
    job = prepare_job(load_config(None, {"workers": 0}, ["tokens.calibration=4096", "search.rounds=1"]))
    walker, text = BlockWalker(load_model(job.checkpoint), job.layout), job.tokens["calibration"].to_tensors()
    levels = prune_on_dense_inputs(
        Calibration(
            walker=walker,
            checkpoint=job.checkpoint,
            layout=job.layout,
            space=job.space,
            pruner=job.pruner,
            examples=text,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        builder = StoreBuilder(Path(scratch) / "levels", job.store_key)
        yield job, job.engine_spec(builder.finish(builder.fill(levels)))


def measure_real() -> dict[str, Any]:
    """Return seconds of the same batches in process, on one worker and on two, taken in turns."""
    with prepared() as (job, spec):
        ray.init("local", num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        evaluators: dict[str, Any] = {
            "in process": LocalEvaluator(spec, job.tokens),
            "one worker": RayPool(spec, job.tokens, 1),
            "two workers": RayPool(spec, job.tokens, 2),
        }
        tokens = 2048
        for evaluator in evaluators.values():
            list(evaluator.evaluate(offspring(job, 8, tokens, 0)))
        seconds: dict[str, list[float]] = {name: [] for name in evaluators}
        for repeat in range(REPEATS):
            batch = offspring(job, BATCH, tokens, 1 + repeat)
            for name in list(evaluators)[:: 1 if repeat % 2 else -1]:
                begun_s = time.perf_counter()
                assert len(list(evaluators[name].evaluate(batch))) == len(batch)
                seconds[name].append(time.perf_counter() - begun_s)
                print(f"real {repeat + 1}/{REPEATS} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
        ray.shutdown()
    ratios = [local / two / 2 for local, two in zip(seconds["in process"], seconds["two workers"], strict=True)]
    return {
        "batch": BATCH,
        "tokens": tokens,
        "seconds": {name: [round(each, 3) for each in values] for name, values in seconds.items()},
        "efficiency": round(statistics.median(ratios), 3),
        "efficiencies": [round(ratio, 3) for ratio in ratios],
    }


def measure_lag(limit: Limit, seeds: int = 2) -> Iterator[dict[str, Any]]:
    """Yield what a search finds for so much, by generations and by lags: its loss on held-out text."""
    with prepared() as (job, spec):
        evaluator, start = LocalEvaluator(spec, job.tokens), [uniform(job.space, job.budget)]
        for seed in range(seeds):
            problem = SearchProblem(
                space=job.space, budget=job.budget, objectives=(job.config.loss,), start=start, seed=seed
            )
            searches: dict[str, tuple[Searcher, int]] = {
                "generations of 16": (
                    ExchangeEvolution(problem, EvolutionSettings(generations=10**6, patience=10**6)),
                    0,
                )
            }
            for lag in (0, 16, 64, 256):
                settings = SteadySettings(trials=10**6, patience=10**6, lag=lag)
                searches[f"lag {lag}"] = SteadyEvolution(problem, settings), lag
            for name, (searcher, lag) in searches.items():
                with tempfile.TemporaryDirectory() as scratch:
                    header = JournalHeader(space=job.space)
                    with Journal.create(Path(scratch) / "journal.jsonl", header) as journal:
                        measurer = Measurer(evaluator, journal)
                        search(searcher, measurer, limit=limit, lag=lag)
                best = searcher.finalists()[0]
                (held_out,) = evaluator.evaluate(
                    [Request(allocation=best, tokens=job.config.tokens.test, split="test")]
                )
                yield {
                    "schedule": name,
                    "seed": seed,
                    "evaluations": measurer.spent.evaluations,
                    "kl": round(held_out.loss, 5),
                }


# simulated workers


@dataclass(frozen=True)
class Schedule:
    """How a search is cut: generations of so many, or one by one with a lag; both in multiples of the workers."""

    kind: str
    per_worker: int

    def searcher(self, space: SearchSpace, budget: Budget, workers: int) -> tuple[Searcher, int]:
        """Return a searcher of about as many evaluations for every schedule, and its lag."""
        count, start = self.per_worker * workers, [uniform(space, budget)]
        problem = SearchProblem(space=space, budget=budget, objectives=("kl",), start=start)
        if self.kind == "generations":
            settings = EvolutionSettings(
                generations=ROUNDS // self.per_worker, patience=10**6, offspring=count, tokens=(TOKENS,), survivors=(1,)
            )
            return ExchangeEvolution(problem, settings), 0
        steady = SteadySettings(trials=ROUNDS * workers, patience=10**6, lag=count - 1, tokens=(TOKENS,))
        return SteadyEvolution(problem, steady), steady.lag


SCHEDULES = [Schedule("generations", n) for n in (1, 4, 16)] + [Schedule("lag", n) for n in (1, 2, 4, 8)]


def made_space(blocks: int = 80) -> SearchSpace:
    """Return as many units as a model of 70 B parameters has sub-blocks."""
    kept = tuple(range(8, -1, -1))
    params = tuple(1000 * count for count in kept)
    units = (
        Unit(
            name=f"{block}.{part}",
            kind="channels",
            part=part,
            block=block,
            total=8,
            kept=kept,
            params=params,
            macs=params,
        )
        for block in range(blocks)
        for part in ("attention", "mlp")
    )
    return SearchSpace("structured", tuple(units), {"params": 0, "macs": 0})


class Simulated(RayPool):
    """A pool of waiters; the engine that it is told of is never made."""

    def __init__(self, space: SearchSpace, workers: int, mean_s: float) -> None:
        self._waiting = (mean_s, SPREAD, 0.0)
        spec = EngineSpec(checkpoint=None, layout=None, space=space)  # type: ignore[arg-type]
        # as long to a mean time as the default is to an evaluation of ten seconds
        text = Examples.from_ids(np.zeros((8, TOKENS // 8), dtype=np.int64))
        super().__init__(spec, {"search": text}, workers, patience_s=max(mean_s, 0.05))

    def _start_actor(self) -> Any:
        return ray.remote(Waiter).options(num_cpus=1).remote(*self._waiting)

    def fit_to_budget(self, stragglers: float) -> None:
        """Go on with another share of stragglers, and wait until every worker is there."""
        self._waiting = (*self._waiting[:2], stragglers)
        self._actors.renew(lambda actor: actor.renew.remote(stragglers))
        while self.alive < self._actors.size:
            list(
                self.evaluate(
                    [Request(allocation=(level,), tokens=8, split="search") for level in range(2 * self._actors.size)]
                )
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[float]]:
        """Yield a list that fills with the share of workers that are at a task, fifty times a second."""
        shares: list[float] = []
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.02):
                members = list(self._actors._members)
                shares.append(sum(member.call is not None for member in members) / len(members))

        watch = threading.Thread(target=look)
        watch.start()
        try:
            yield shares
        finally:
            over.set()
            watch.join()


@contextlib.contextmanager
def simulated_cluster(workers: int) -> Iterator[None]:
    """Hold a Ray cluster of several nodes with a CPU for every worker, all on this machine."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=-(-workers // NODES))
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def simulate(workers: int, mean_s: float) -> Iterator[dict[str, Any]]:
    """Yield a line for every schedule, with stragglers and without."""
    space = made_space()
    budget = Budget(params=space.limit_for(0.5))
    with simulated_cluster(workers):
        pool = Simulated(space, workers, mean_s)
        for stragglers in (0.0, STRAGGLERS):
            for schedule in SCHEDULES:
                pool.fit_to_budget(stragglers)
                searcher, lag = schedule.searcher(space, budget, workers)
                outcomes: list[Outcome] = []
                with tempfile.TemporaryDirectory() as scratch:
                    path = Path(scratch) / "journal.jsonl"
                    with Journal.create(path, JournalHeader(space=space)) as journal, pool.watched() as shares:
                        begun_s, cpu_s = time.perf_counter(), time.process_time()
                        search(searcher, Measurer(pool, journal), outcomes.extend, lag=lag)
                        wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
                measured = list({outcome.request.key: outcome for outcome in outcomes}.values())
                yield {
                    "workers": workers,
                    "mean_s": mean_s,
                    "stragglers": stragglers,
                    "schedule": schedule.kind,
                    "per_worker": schedule.per_worker,
                    "evaluations": len(measured),
                    "wall_s": round(wall_s, 2),
                    "busy": round(statistics.mean(shares), 3),
                    "useful": round(sum(outcome.wall_s for outcome in measured) / wall_s / workers, 3),
                    "driver_ms": round(1000 * cpu_s / len(measured), 3),
                }


def measure_driver() -> dict[str, Any]:
    """Return the driver's CPU time for each evaluation of batches of 64, where workers answer at once."""
    space, rng = made_space(), np.random.default_rng(0)
    batches = [
        [
            Request(allocation=tuple(map(int, row)), tokens=TOKENS)
            for row in rng.integers(9, size=(BATCH, len(space.units)))
        ]
        for _ in range(60)
    ]
    found: dict[str, Any] = {}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init("local", num_cpus=64, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    for workers in (2, 8, 32):
        pool = Simulated(space, workers, 0.0)
        pool.fit_to_budget(0.0)
        with tempfile.TemporaryDirectory() as scratch:
            with Journal.create(Path(scratch) / "journal.jsonl", JournalHeader(space=space)) as journal:
                measurer, each = Measurer(pool, journal), []
                for batch in batches:
                    cpu_s = time.process_time()
                    measurer.measure(batch)
                    each.append(1000 * (time.process_time() - cpu_s) / BATCH)
        pool.close()
        found[str(workers)] = round(statistics.median(each[10:]), 3)
        print(f"driver {workers} workers: {found[str(workers)]}", file=sys.stderr)
    ray.shutdown()
    return {"batch": BATCH, "workers": found}


# results


def results() -> dict[str, Any]:
    """Return what was measured."""
    path = RESULTS / "scaling.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(part: str, measured: Any) -> None:
    """Put what was measured beside the other parts."""
    (RESULTS / "scaling.json").write_text(json.dumps({**results(), part: measured}, indent=1) + "\n")


def tables(found: dict[str, Any]) -> str:
    """Return the tables."""
    lines = []
    if "real" in found:
        seconds = {name: statistics.median(values) for name, values in found["real"]["seconds"].items()}
        lines += ["| where | median seconds | efficiency |", "|---|---|---|"]
        for name, value in seconds.items():
            workers = 2 if name == "two workers" else 1
            both = zip(found["real"]["seconds"]["in process"], found["real"]["seconds"][name], strict=True)
            ratios = [alone / own / workers for alone, own in both]
            lines.append(f"| {name} | {value:.2f} | {statistics.median(ratios):.2f} |")
    if "driver" in found:
        lines += ["", "| workers | driver CPU, ms an evaluation |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in found["driver"]["workers"].items()]
    if "simulated" in found:
        lines += [
            "",
            "| workers | schedule | busy | useful | busy, 1 % stragglers | useful | driver ms |",
            "|---|---|---|---|---|---|---|",
        ]
        rows: dict[tuple[int, str, int], dict[float, dict[str, Any]]] = {}
        for line in found["simulated"]:
            rows.setdefault((line["workers"], line["schedule"], line["per_worker"]), {})[line["stragglers"]] = line
        for (workers, kind, per_worker), by in rows.items():
            name = f"{kind} of {per_worker * workers}" if kind == "generations" else f"lag {per_worker * workers - 1}"
            cells = [f"{by[s][key]:.2f}" if s in by else "–" for s in (0.0, STRAGGLERS) for key in ("busy", "useful")]
            driver = statistics.mean(line["driver_ms"] for line in by.values())
            lines.append(f"| {workers} | {name} | {' | '.join(cells)} | {driver:.2f} |")
    if "lag" in found:
        seeds = sorted({line["seed"] for line in found["lag"]})
        lines += ["", f"| schedule | {' | '.join(f'held-out KL, seed {seed}' for seed in seeds)} |", "|---" * 3 + "|"]
        names = dict.fromkeys(line["schedule"] for line in found["lag"])
        for name in names:
            kls = [f"{line['kl']:.4f}" for line in found["lag"] if line["schedule"] == name]
            lines.append(f"| {name} | {' | '.join(kls)} |")
    return "\n".join(lines)


def draw(lines: Sequence[dict[str, Any]]) -> None:
    """Draw how busy workers are against how much is in flight for each of them."""
    from matplotlib.figure import Figure

    from allocator.report.figures import to_svg

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    sizes = sorted({line["workers"] for line in lines})
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, workers in zip(panels, sizes, strict=True):
        for kind, colour in (("generations", "tab:orange"), ("lag", "tab:blue")):
            for stragglers, style in ((0.0, "--"), (STRAGGLERS, "-")):
                own = [
                    (line["per_worker"], line["busy"])
                    for line in lines
                    if (line["workers"], line["schedule"], line["stragglers"]) == (workers, kind, stragglers)
                ]
                label = f"{kind}, {'1 % stragglers' if stragglers else 'no stragglers'}"
                axes.plot(*zip(*sorted(own), strict=True), style, marker="o", ms=3, color=colour, label=label)
        axes.axhline(0.9, color="grey", lw=0.6)
        axes.set(xscale="log", title=f"{workers} workers", xlabel="in flight, for each worker", ylim=(0, 1.02))
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"], minor=False)
        axes.minorticks_off()
    panels[0].set_ylabel("share of time at work")
    panels[-1].legend(fontsize=7, loc="lower right")
    (RESULTS / "scaling.svg").write_text(to_svg(figure, "scaling"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["real", "driver", "simulated", "lag"])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--mean", type=float, default=0.5, help="Seconds of a simulated evaluation.")
    arguments = parser.parse_args()
    if arguments.part == "real":
        keep("real", measure_real())
    elif arguments.part == "driver":
        keep("driver", measure_driver())
    elif arguments.part == "lag":
        lines = []
        for line in measure_lag(LIMIT):
            print(json.dumps(line), file=sys.stderr)
            lines.append(line)
            keep("lag", lines)
    elif arguments.part == "simulated":
        for workers in arguments.workers:
            own = []
            for line in simulate(workers, arguments.mean):
                print(json.dumps(line), file=sys.stderr)
                own.append(line)
            others = [line for line in results().get("simulated", []) if line["workers"] != workers]
            keep("simulated", sorted([*others, *own], key=lambda line: (line["workers"], line["stragglers"])))
    found = results()
    print(tables(found))
    if "simulated" in found:
        draw(found["simulated"])


if __name__ == "__main__":
    main()
