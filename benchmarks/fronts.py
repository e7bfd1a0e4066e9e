"""Hypervolume of fronts against candidate-tokens, of every method that serves several objectives.

    allocator latency --out /tmp/fronts/latency.json
    python -m benchmarks.fronts --work /tmp/fronts [--cells params.sweep.0 ...] [--workers 2]
    python -m benchmarks.fronts

A cell is a set of objectives, a method and a seed, on the packaged model with dense inputs; `params.auto` searches one
budget instead, half of the parameters in units. Cells are resumed and cached under `--work`; what the second command
needs goes to `results/fronts.json`: the hypervolume after every batch, the least loss at that one budget, and of
EMO-PMS what an evaluation of one group costs of a whole one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from allocator.core.budget import Budget, fits
from allocator.core.effort import Limit, candidate_tokens
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Request
from allocator.searchers.hypervolume import Hypervolume
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.emo_pms import EmoPmsSettings
from allocator.searchers.methods.nsga import NsgaSettings
from allocator.searchers.methods.sweep import make_budgets
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.settings import SearchSettings

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "fronts.json"

TEXT = 4096
"""Tokens of the search split on which every method knows an allocation in full."""

SETS = {"params": ("params",), "latency": ("latency_ms",), "latency and cache": ("latency_ms", "kv_bytes")}
_BASE = SearchSettings(
    tokens=(512, 1024, TEXT),
    nsga=NsgaSettings(generations=40, population=24, profile=512, tokens=TEXT),
    emo_pms=EmoPmsSettings(profile=512, tokens=TEXT),
    tpe=TpeSettings(trials=200, tokens=TEXT),
    gp=GpSettings(trials=120, tokens=TEXT),
)
_COLOURS = {
    "sweep": "#0072b2",
    "nsga2": "#d55e00",
    "nsga3": "#e69f00",
    "emo_pms": "#009e73",
    "tpe": "#cc79a7",
    "gp": "#56b4e9",
}
METHODS = {name: replace(_BASE, method=name) for name in _COLOURS}
ONE = "params.auto"
CELLS = [
    f"{search}.{seed}"
    for search in [ONE, *(f"{objectives}.{method}" for objectives in SETS for method in METHODS)]
    for seed in range(3)
]


def run_cell(cell: str, work: Path) -> str:
    """Search, and return what is kept of the cell as JSON."""
    # imported here: table and figure need no model
    from allocator.evaluation.local import LocalEvaluator
    from allocator.pruning.levels.store import StoreBuilder, open_store
    from allocator.run.config.load import load_config
    from allocator.run.prepare import prepare_job

    chosen, method, seed = cell.rsplit(".", 2)
    objectives = SETS[chosen]
    settings = ["pruner.inputs=dense", "search.method=evolution", f"search.evolution.tokens=[1024,{TEXT}]"]
    table = [f"workload.latency={work / 'latency.json'}"] if "latency" in chosen else []
    job = prepare_job(load_config(None, {"workers": 0}, [*settings, *table]))
    levels = open_store(work / "levels", job.store_key)
    if levels is None:
        builder = StoreBuilder(work / "levels", job.store_key)
        LocalEvaluator(job.engine_spec(None), job.tokens).build(builder, builder.missing(job.space), lambda done: None)
        levels = builder.finish(unit.name for unit in job.space.units)
    space, path = job.space, work / f"{cell.replace(' ', '-')}.jsonl"
    whole, half = Budget(params=space.cost(space.dense)), Budget(params=space.limit_for(0.5))
    alone = cell.startswith(ONE)
    limits = [half] if alone else make_budgets(space, whole, objectives[:1], 3)
    start = [uniform(space, budget) for budget in limits]
    with Journal.resume(path) if path.exists() else Journal.create(path, JournalHeader(space=space)) as journal:
        measurer = Measurer(LocalEvaluator(job.engine_spec(levels), job.tokens), journal)
        measurer.measure([Request(allocation=allocation, tokens=TEXT) for allocation in start])
        if alone:
            searcher = _BASE.configured.make(
                SearchProblem(space=space, budget=half, objectives=("kl",), start=start, seed=int(seed))
            )
        else:
            searcher = METHODS[method].configured.make(
                SearchProblem(space=space, budget=whole, objectives=["kl", *objectives], start=start, seed=int(seed))
            )
        search(searcher, measurer, limit=Limit(3e6, "tokens"))
        full = (o for o in journal if o.request == Request(allocation=o.request.allocation, tokens=TEXT))
        found = {
            "curve": Hypervolume(journal, ["kl", *objectives], TEXT).curve(),
            "half": min((o.loss for o in full if fits(space, o.request.allocation, half)), default=None),
            "local": local_share(journal),
        }
        return json.dumps({"cell": cell, **found})


def local_share(journal: Journal) -> list[float] | None:
    """Return what an evaluation of a group costs of a whole one, in candidate-tokens and in seconds; None without any.

    Whole ones are those of merged schemes, which hardly share anything. Per token, and of seconds the medians.
    """
    spent: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for batch in journal.batches[1:]:
        costs = candidate_tokens(journal.space, [outcome.request for outcome in batch])
        for outcome, cost in zip(batch, costs, strict=True):
            tokens = outcome.request.tokens
            if outcome.request.blocks or tokens == TEXT:
                spent[bool(outcome.request.blocks)].append((cost / tokens, outcome.wall_s / tokens))
    if not spent[True]:
        return None
    local, entire = (np.array(spent[kind]) for kind in (True, False))
    tokens, seconds = local[:, 0].mean() / entire[:, 0].mean(), np.median(local[:, 1]) / np.median(entire[:, 1])
    return [round(float(tokens), 4), round(float(seconds), 4)]


def _reaches(points: Sequence[Sequence[float]], aim: float) -> float:
    return next((tokens for _, tokens, volume in points if volume >= aim), float("nan"))


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Return, for each set of objectives and method, where it ends and how soon it is where NSGA-II ends."""
    curves = {cell: found["curve"] for cell, found in cells.items()}
    lines = [
        "| objectives beside KL | method | seeds | hypervolume | evaluations | candidate-tokens "
        "| is where NSGA-II ends after | of its tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for objectives in SETS:
        ends = [points[-1] for cell, points in curves.items() if cell.startswith(f"{objectives}.nsga2.")]
        for method in METHODS:
            runs = [points for cell, points in curves.items() if cell.startswith(f"{objectives}.{method}.")]
            if not runs:
                continue
            volumes = sorted(points[-1][2] for points in runs)
            spread = f"{median(volumes):.4f}" + (f" ({volumes[0]:.4f}–{volumes[-1]:.4f})" if len(runs) > 1 else "")
            there = "–"
            part = "–"
            if ends and method != "nsga2":
                aim, whole = median(end[2] for end in ends), median(end[1] for end in ends)
                reached = median(_reaches(points, aim) for points in runs)
                there, part = ("never", "–") if np.isnan(reached) else (f"{reached:,.0f}", f"1/{whole / reached:.1f}")
            lines.append(
                f"| {objectives} | {method} | {len(runs)} | {spread} | {median(p[-1][0] for p in runs):,.0f} "
                f"| {median(p[-1][1] for p in runs):,.0f} | {there} | {part} |"
            )
    return "\n".join(lines)


def one_budget(cells: dict[str, dict[str, Any]]) -> str:
    """Return what a front by a sweep takes, and has at one budget, beside a search at that budget alone."""
    lines = ["| | seeds | candidate-tokens | KL at half of the units |", "|---|---|---|---|"]
    for name, method in (("one budget, `auto`", ONE), ("18 budgets, `sweep`", "params.sweep")):
        runs = [found for cell, found in cells.items() if cell.startswith(f"{method}.")]
        if runs:
            tokens, losses = [r["curve"][-1][1] for r in runs], sorted(r["half"] for r in runs)
            spread = f"{median(losses):.4f} ({losses[0]:.4f}–{losses[-1]:.4f})"
            lines.append(f"| {name} | {len(runs)} | {median(tokens):,.0f} | {spread} |")
    return "\n".join(lines)


def local_costs(cells: dict[str, dict[str, Any]]) -> str:
    """Return what an evaluation of one of EMO-PMS's groups costs of a whole one, per token."""
    shares = [found["local"] for found in cells.values() if found["local"]]
    tokens, seconds = (median(each) for each in zip(*shares, strict=True)) if shares else (np.nan, np.nan)
    groups = _BASE.emo_pms.groups
    return (
        f"An evaluation of one of {groups} groups costs {tokens:.3f} of a whole one in candidate-tokens, and "
        f"{seconds:.3f} in seconds (median of {len(shares)} runs; 1/{groups} is {1 / groups:.3f})."
    )


def figure_of(curves: dict[str, list[list[float]]]) -> Figure:
    """Draw hypervolume against candidate-tokens."""
    shown = [objectives for objectives in SETS if any(cell.startswith(f"{objectives}.") for cell in curves)]
    picture = Figure(figsize=(3.6 * len(shown), 3.2), layout="constrained")
    for axes, objectives in zip(np.atleast_1d(picture.subplots(1, len(shown))), shown, strict=True):
        for cell, points in curves.items():
            chosen, method, seed = cell.rsplit(".", 2)
            if chosen == objectives:
                spent, volumes = [point[1] for point in points], [point[2] for point in points]
                label = method if seed == "0" else None
                axes.step(spent, volumes, where="post", color=_COLOURS[method], lw=1.2, label=label)
        axes.set(title=objectives, xlabel="candidate-tokens", ylabel="hypervolume", xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where cells are kept; without it nothing is run")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    cells = json.loads(FILE.read_text()) if FILE.exists() else {}
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(arguments.workers) as pool:
            for done in as_completed([pool.submit(run_cell, cell, arguments.work) for cell in arguments.cells]):
                found = json.loads(done.result())
                cells[cell := found.pop("cell")] = found
                cells = {cell: cells[cell] for cell in CELLS if cell in cells}
                FILE.write_text(json.dumps(cells) + "\n")
                print(cell, *found["curve"][-1], found["half"], found["local"], flush=True)
    print(table(cells), one_budget(cells), local_costs(cells), sep="\n\n")
    curves = {cell: found["curve"] for cell, found in cells.items() if not cell.startswith(ONE)}
    figure_of(curves).savefig(RESULTS / "fronts.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
