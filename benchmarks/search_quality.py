"""Held-out quality against candidate-tokens, of every search method on several level stores.

    python -m benchmarks.search_quality --work /tmp/search_quality [--part smoke|core|rest] [--workers 2]
    python -m benchmarks.search_quality

A cell is one store, one method, one seed. Cells are resumed and cached under `--work`; the outcomes of those that are
done go to `results/search_quality/`. Without `--work` curves, table and figure are made again from these, without a
model. Stores of the second architecture need `train_packaged_model.py --architecture qwen3 --out WORK/qwen3`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure

from allocator.core.budget import fits
from allocator.core.effort import Limit, candidate_tokens
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.settings import SearchSettings

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "search_quality"

TEXT = 4096
"""Tokens of the search split on which every method knows an allocation in full."""

HELD_OUT = 16384
"""Tokens of the test split on which incumbents are measured; not counted as spent."""

INCUMBENTS = 40
"""Incumbents of a cell that are measured on held-out text, at most: evenly spaced ones."""

LEAN = Limit(3e5, "tokens")
LEAN_METHODS = ("guided", "tpe", "gp", "thompson")


@dataclass(frozen=True)
class Store:
    """A level store to search.

    Attributes:
        pattern: What is removed.
        target: How much of it.
        model: A folder under ``--work``; none for the packaged model.
        share: Of evolution's candidate-tokens, in which ``auto`` shall be as good.
    """

    pattern: str
    target: float
    model: str = ""
    share: float = 1 / 15


STORES = {
    "structured-50": Store("structured", 0.5, share=1 / 5),
    "unstructured-60": Store("unstructured", 0.6),
    "structured-30": Store("structured", 0.3, share=1 / 5),
    "structured-70": Store("structured", 0.7, share=1 / 5),
    "unstructured-50": Store("unstructured", 0.5),
    "unstructured-70": Store("unstructured", 0.7),
    "mixed-2-4": Store("n:m", 0.5),
    "qwen3-structured-50": Store("structured", 0.5, "qwen3"),
    "qwen3-unstructured-60": Store("unstructured", 0.6, "qwen3"),
}
CORE_STORES = ("structured-50", "unstructured-60")


@dataclass(frozen=True)
class Method:
    """A searcher's settings, and how much it may spend."""

    settings: SearchSettings
    limit: Limit


_ENDLESS = EvolutionSettings(generations=10_000, patience=10_000, offspring=16, tokens=(1024, TEXT), survivors=(3, 1))
_BASE = SearchSettings(tokens=(512, 1024, TEXT), evolution=_ENDLESS)


def _lean(method: str) -> Method:
    settings = SearchSettings(method=method, tokens=_BASE.tokens)
    if method != "guided":
        settings = replace(settings, **{method: replace(getattr(settings, method), tokens=TEXT)})
    return Method(settings, LEAN)


METHODS: dict[str, Method] = {
    "evolution": Method(replace(_BASE, method="evolution"), Limit(3000, "evaluations")),
    "auto": Method(replace(_BASE, method="auto"), Limit(6e5, "tokens")),
    "trust_region": Method(replace(_BASE, method="trust_region"), Limit(6e5, "tokens")),
    **{name: _lean(name) for name in LEAN_METHODS},
    "evolution-300k": Method(replace(_BASE, method="evolution"), LEAN),
}

Cell = tuple[str, str, int]
CORE: list[Cell] = [
    *[(store, method, seed) for seed in range(5) for store in CORE_STORES for method in ("evolution", "auto")],
    *[(store, "trust_region", 0) for store in CORE_STORES],  # it draws nothing: all seeds are one
]
REST: list[Cell] = [
    *[(s, m, seed) for seed in range(2) for s in STORES if s not in CORE_STORES for m in ("evolution-300k", "auto")],
    *[(s, m, seed) for seed in range(2) for s in CORE_STORES for m in LEAN_METHODS],
]
SMOKE: list[Cell] = [(store, "auto", 0) for store in CORE_STORES]


@dataclass(frozen=True)
class Point:
    """Where a search was when its incumbent changed.

    Attributes:
        tokens: Candidate-tokens spent so far.
        best: The incumbent.
        loss: Of the incumbent, on the search split.
        held_out: Of the incumbent, on the test split; NaN where it was not measured.
    """

    tokens: float
    best: Allocation
    loss: float
    held_out: float


@dataclass(frozen=True)
class Run:
    """A finished cell.

    Attributes:
        points: Where it was, from uniform on.
        evaluations: Measured in all.
        tokens: Candidate-tokens spent in all.
    """

    points: list[Point]
    evaluations: int
    tokens: float

    def at(self, tokens: float) -> float:
        """Held-out loss of the last measured incumbent after so many tokens."""
        known = [p.held_out for p in self.points if p.tokens <= tokens and not np.isnan(p.held_out)]
        return known[-1] if known else float("nan")

    def reaches(self, held_out: float) -> float:
        """Tokens after which the held-out loss is first as low; NaN if it never is."""
        return next((p.tokens for p in self.points if p.held_out <= held_out), float("nan"))


def run_cell(store: str, method: str, seed: int, work: Path) -> str:
    """Search, measure incumbents on held-out text, and record the outcomes."""
    # imported here: a replay needs no model
    from allocator.evaluation.local import LocalEvaluator
    from allocator.pruning.levels.store import StoreBuilder, open_store
    from allocator.run.config.load import load_config
    from allocator.run.prepare import prepare_job

    chosen, folder = STORES[store], work / store
    settings = ["pruner.inputs=dense", "search.method=evolution"]
    settings += [f"search.evolution.tokens=[1024,{TEXT}]", f"tokens.test={HELD_OUT}"]
    model = {"model": str(work / chosen.model)} if chosen.model else {}
    job = prepare_job(
        load_config(None, {"pattern": chosen.pattern, "target": chosen.target, "workers": 0, **model}, settings)
    )
    levels = open_store(folder / "levels", job.store_key)
    if levels is None:
        builder = StoreBuilder(folder / "levels", job.store_key)
        LocalEvaluator(job.engine_spec(None), job.tokens).build(builder, builder.missing(job.space), lambda done: None)
        levels = builder.finish(unit.name for unit in job.space.units)
    path = folder / f"{method}-{seed}.jsonl"
    header = JournalHeader(space=job.space, budget=job.budget)
    with Journal.resume(path) if path.exists() else Journal.create(path, header) as journal:
        evaluator = LocalEvaluator(job.engine_spec(levels), job.tokens)
        how, start = METHODS[method], [uniform(job.space, job.budget)]
        measurer = Measurer(evaluator, journal)
        searcher = how.settings.configured.make(
            SearchProblem(space=job.space, budget=job.budget, objectives=(job.config.loss,), start=start, seed=seed)
        )
        ended = search(searcher, measurer, limit=how.limit)
        incumbents = [point.best for point in read_run(journal).points]
        some = sorted({round(i) for i in np.linspace(0, len(incumbents) - 1, min(len(incumbents), INCUMBENTS))})
        measurer.measure([Request(allocation=incumbents[i], tokens=HELD_OUT, split="test") for i in some])
        last = read_run(journal)
    record(path, RECORDS / f"{store}.{method}.{seed}.jsonl.gz")
    return f"{store} {method} {seed}: {last.points[-1].held_out:.4f} after {last.tokens:,.0f} candidate-tokens; {ended}"


def read_run(journal: Journal) -> Run:
    """Return where a search was, from what it measured: no searcher is needed for that."""
    space, budget = journal.space, journal.header.budget
    tested = {o.request.allocation: o.loss for o in journal if o.request.split == "test"}
    points: list[Point] = []
    evaluations, tokens = 0, 0.0
    for batch in journal.batches:
        batch = [outcome for outcome in batch if outcome.request.split == "search"]
        evaluations += len(batch)
        tokens += sum(candidate_tokens(space, [outcome.request for outcome in batch]))
        full = [o for o in batch if o.request.tokens == TEXT and not o.request.probe]
        within = [o for o in full if fits(space, o.request.allocation, budget)]
        best = min(within, key=_order, default=None)
        if best is not None and (not points or best.loss < points[-1].loss):
            allocation = best.request.allocation
            points.append(Point(tokens, allocation, best.loss, tested.get(allocation, float("nan"))))
    return Run(points, evaluations, tokens)


def _order(outcome: Outcome) -> tuple[float, Allocation]:
    return outcome.loss, outcome.request.allocation


def record(journal: Path, path: Path) -> None:
    """Write a journal compressed, without what a replay does not need."""
    lines = []
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        for name in ("parts", "expansion"):
            entry.pop(name, None)
        if "wall_s" in entry:
            entry["wall_s"] = 0.0
        lines.append(json.dumps(entry, separators=(",", ":")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))


@cache
def recorded() -> Mapping[Cell, Run]:
    """Return all cells whose outcomes are there."""
    runs = {}
    for path in sorted(RECORDS.glob("*.jsonl.gz")):
        store, method, seed = path.name.removesuffix(".jsonl.gz").rsplit(".", 2)
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as plain:
            plain.write(gzip.decompress(path.read_bytes()))
            plain.flush()
            runs[store, method, int(seed)] = read_run(Journal.read(Path(plain.name)))
    return runs


def _seeds(store: str, method: str) -> dict[int, Run]:
    return {seed: run for (s, m, seed), run in recorded().items() if (s, m) == (store, method)}


def targets_table() -> str:
    """Return how soon ``auto`` is where evolution is after 3,000 evaluations, seed by seed."""
    lines = [
        "| store | seed | evolution, held-out KL | after tokens | `auto` is there after | of these | target | met "
        "| `auto` at that share | trust region alone is there after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for store in CORE_STORES:
        autos, regions = _seeds(store, "auto"), _seeds(store, "trust_region")
        for seed, evolution in sorted(_seeds(store, "evolution").items()):
            if seed not in autos:
                continue
            aim, share = evolution.points[-1].held_out, STORES[store].share
            reached = autos[seed].reaches(aim)
            region = regions[0].reaches(aim) if regions else float("nan")
            lines.append(
                f"| {store} | {seed} | {aim:.4f} | {evolution.tokens:,.0f} | {_number(reached)} "
                f"| {_part(reached, evolution.tokens)} | 1/{1 / share:.0f} "
                f"| {'yes' if reached <= share * evolution.tokens else 'no'} "
                f"| {autos[seed].at(share * evolution.tokens):.4f} | {_number(region)} |"
            )
    return "\n".join(lines)


def methods_table() -> str:
    """Return held-out losses of all methods on all stores, at equal candidate-tokens and at their ends."""
    stops = (1e5, 3e5)
    lines = [
        "| store | method | seeds | "
        + " | ".join(f"{stop / 1e3:.0f}k" for stop in stops)
        + " | end | evaluations | tokens |",
        "|---|---|---|" + "---|" * (len(stops) + 3),
    ]
    for store in STORES:
        for method in METHODS:
            runs = list(_seeds(store, method).values())
            if runs:
                cells = [_spread([run.at(stop) for run in runs]) for stop in stops]
                cells.append(_spread([run.points[-1].held_out for run in runs]))
                cells += [f"{median(r.evaluations for r in runs):,.0f}", f"{median(r.tokens for r in runs):,.0f}"]
                lines.append(f"| {store} | {method} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return "–"
    low, high = min(known), max(known)
    return f"{median(known):.4f}" if low == high else f"{median(known):.4f} ({low:.4f}–{high:.4f})"


def _number(tokens: float) -> str:
    return "never" if np.isnan(tokens) else f"{tokens:,.0f}"


def _part(tokens: float, whole: float) -> str:
    return "–" if np.isnan(tokens) else f"1/{whole / tokens:.0f}"


_COLOURS = {
    "evolution": "#d55e00",
    "auto": "#0072b2",
    "trust_region": "#009e73",
    "guided": "#56b4e9",
    "tpe": "#cc79a7",
    "gp": "#e69f00",
    "thompson": "#999999",
}


def figure() -> Figure:
    """Draw curves of the core stores: the median over seeds, and the range where there are several."""
    picture = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, store in zip(picture.subplots(1, len(CORE_STORES)), CORE_STORES, strict=True):
        lowest = []
        for method, colour in _COLOURS.items():
            runs = list(_seeds(store, method).values())
            if not runs:
                continue
            grid = np.geomspace(2e4, max(run.tokens for run in runs), 200)
            held_rg = np.array([[run.at(tokens) for tokens in grid] for run in runs])
            known_g = ~np.isnan(held_rg).any(0)
            middle_g = np.median(held_rg[:, known_g], axis=0)
            axes.plot(grid[known_g], middle_g, color=colour, lw=1.5, label=f"{method.replace('_', ' ')} ({len(runs)})")
            if len(runs) > 1:
                low_g, high_g = held_rg[:, known_g].min(0), held_rg[:, known_g].max(0)
                axes.fill_between(grid[known_g], low_g, high_g, color=colour, alpha=0.15, lw=0)
            lowest.append(middle_g.min())
        axes.set(xscale="log", title=store, xlabel="candidate-tokens", ylabel="held-out KL, nats per token")
        if lowest:
            axes.set_ylim(0.97 * min(lowest), 1.5 * min(lowest))
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where stores and journals are kept; without it nothing is run")
    parser.add_argument("--part", choices=("smoke", "core", "rest"), default="core")
    parser.add_argument("--cells", nargs="+", help="store/method/seed, in place of a part", default=[])
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.work is not None:
        named = [(s, m, int(seed)) for s, m, seed in (cell.rsplit("/", 2) for cell in arguments.cells)]
        cells = named or {"smoke": SMOKE, "core": CORE, "rest": REST}[arguments.part]
        for message in _run(cells, arguments.work, arguments.workers):
            print(message, flush=True)
    print(targets_table(), methods_table(), sep="\n\n")
    figure().savefig(RESULTS / "search_quality.svg", metadata={"Date": None})


def _run(cells: Iterable[Cell], work: Path, workers: int) -> Iterator[str]:
    if workers == 1:
        yield from (run_cell(*cell, work) for cell in cells)
        return
    with ProcessPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(run_cell, *cell, work) for cell in cells]):
            yield done.result()


if __name__ == "__main__":
    main()
