"""What the inputs of pruning are worth: held-out KL of one allocation, its levels made on different inputs.

    python -m benchmarks.inputs

On the packaged model, for structured and unstructured pruners, allocations are fixed: uniform, and that of the
committed reference plan where its ladders fit. Their levels are made on what dense predecessors produce, on the
expectation over all levels, and along the allocation itself; the last also with dense weights as the target of every
refit. Every figure is a checkpoint that was saved, loaded again and measured on the test split. Writes
`results/inputs.json`, a table on standard output and `results/inputs.svg`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from matplotlib.figure import Figure

from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.engine import Engine
from allocator.pruning.calibration import streams
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.execute import save_pruned
from allocator.run.config.run import RunConfig
from allocator.run.job import Job
from allocator.run.prepare import prepare_job
from allocator.searchers.rules.baselines import uniform

RESULTS = Path(__file__).parent / "results"
REFERENCE = Path(__file__).parent.parent / "runs" / "reference" / "plan.json"
CASES = (("structured", 0.5, "obs"), ("unstructured", 0.6, "wanda"), ("unstructured", 0.6, "sparsegpt"))
INPUTS = {
    "dense": "dense",
    "expected": "expected",
    "plain path": "path, dense weights as target",
    "path": "path",
}
COLOURS = ("#bbbbbb", "#e69f00", "#56b4e9", "#0072b2")
Row = dict[str, object]


def allocations(job: Job) -> dict[str, Allocation]:
    """Return the fixed allocations of a search space by name."""
    fixed = {"uniform": uniform(job.space, job.budget)}
    planned = reference(job.space)
    return fixed if planned is None else {**fixed, "reference plan": planned}


def reference(space: SearchSpace) -> Allocation | None:
    """Return the levels of the committed plan, or None where its ladders are others."""
    units = json.loads(REFERENCE.read_text())["units"]
    if [(name, tuple(unit["ladder"]["kept"])) for name, unit in units.items()] != [
        (u.name, u.kept) for u in space.units
    ]:
        return None
    return tuple(unit["level"] for unit in units.values())


def pruned(job: Job, inputs: str, allocation: Allocation) -> dict[str, CompactLevels]:
    """Return the compact levels of every unit, made on some inputs."""
    calibration = job.engine_spec(None).calibration(job.tokens["calibration"])
    if inputs == "dense":
        return dict(prune_on_dense_inputs(calibration))
    if inputs == "expected":
        return dict(prune_on_pruned_inputs(calibration, None, every_level=True))
    with plain_targets() if inputs == "plain path" else nullcontext():
        return dict(prune_on_pruned_inputs(calibration, allocation, every_level=False))


@contextmanager
def plain_targets() -> Iterator[None]:
    """Have refits aim at the dense weights, whatever their inputs."""

    def dense(weight_oi: torch.Tensor, *_: object) -> torch.Tensor:
        return weight_oi.double()

    with mock.patch.object(streams, "nearest", dense):
        yield


def rows(pattern: str, target: float, pruner: str, tokens: int, say: Callable[[Row], None]) -> list[Row]:
    """Return one row per allocation and kind of inputs."""
    splits = {"calibration": tokens, "test": tokens}
    config = RunConfig.model_validate(
        {"pattern": pattern, "target": target, "workers": 0, "pruner": {"name": pruner}, "tokens": splits}
    )
    job, found = prepare_job(config), []
    engine = Engine(job.engine_spec(None), job.tokens)
    # the same levels serve every allocation, but for those made along one
    shared: dict[str, tuple[Mapping[str, CompactLevels], float]] = {}
    for name, allocation in allocations(job).items():
        for inputs in INPUTS:
            if inputs == "plain path" and job.pruner.need != "gram":
                continue  # there is no refit
            if inputs not in shared or inputs.endswith("path"):
                start = time.process_time()
                levels = pruned(job, inputs, allocation)
                shared[inputs] = levels, time.process_time() - start
            levels, cpu_s = shared[inputs]
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "checkpoint"
                save_pruned(allocation, job.checkpoint, job.layout, job.space, levels.__getitem__, out)
                measured = engine.measure_checkpoint(out, "test", tokens)
            found.append({
                "pattern": pattern,
                "target": target,
                "pruner": pruner,
                "allocation": name,
                "inputs": inputs,
                "tokens": tokens,
                "kl": round(measured["kl"], 4),
                "perplexity": round(measured["perplexity"], 2),
                "cpu_s": round(cpu_s, 1),
            })  # fmt: skip
            say(found[-1])
    return found


def by_setting(found: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Return rows by (pruner and target, allocation), then by inputs."""
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:
        key = f"{row['pattern']} {row['target']:.0%}, {row['pruner']}", str(row["allocation"])
        grouped.setdefault(key, {})[str(row["inputs"])] = row
    return grouped


def table(found: list[Row]) -> str:
    """Return a markdown table: a row per setting, KL by inputs."""
    lines = [
        f"| pruner | allocation | {' | '.join(INPUTS.values())} | path vs dense |",
        f"|---|---|{'---|' * len(INPUTS)}---|",
    ]
    for (pruner, allocation), by_inputs in by_setting(found).items():
        figures = [f"{by_inputs[inputs]['kl']:.4f}" if inputs in by_inputs else "–" for inputs in INPUTS]
        change = by_inputs["path"]["kl"] / by_inputs["dense"]["kl"] - 1
        lines.append(f"| {pruner} | {allocation} | {' | '.join(figures)} | {change:+.1%} |")
    return "\n".join(lines)


def figure(found: list[Row]) -> Figure:
    """Return bars of KL, a group per setting."""
    grouped = by_setting(found)
    picture = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = picture.subplots()
    for place, by_inputs in enumerate(grouped.values()):
        for index, (inputs, label) in enumerate(INPUTS.items()):
            if inputs in by_inputs:
                height = by_inputs[inputs]["kl"]
                bar = axes.bar(place + 0.2 * (index - 1.5), height, 0.18, color=COLOURS[index])
                axes.bar_label(bar, fmt="%.3f", fontsize=6)
                bar.set_label(label if place == 0 else "_")
    axes.set_xticks(range(len(grouped)), [f"{pruner}\n{allocation}" for pruner, allocation in grouped], fontsize=7)
    axes.set_ylabel("held-out KL, nats per token", fontsize=8)
    axes.legend(fontsize=7, frameon=False, title="inputs", title_fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration, and of the test split")
    arguments = parser.parse_args()
    found: list[Row] = []
    for case in CASES:
        found += rows(*case, arguments.tokens, lambda row: print(row, file=sys.stderr, flush=True))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "inputs.json").write_text(json.dumps(found, indent=1) + "\n")
    figure(found).savefig(RESULTS / "inputs.svg", metadata={"Date": None})
    print(table(found))


if __name__ == "__main__":
    main()
