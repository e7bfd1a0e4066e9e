"""Peak memory of building a level store, of searching and of saving a plan, as the model grows in blocks.

    python -m benchmarks.memory

Random Llamas of d = 512, in bfloat16 on disk and float32 at work. Each figure is the peak resident memory of a
process of its own, less what an idle process with the same imports holds. glibc keeps freed pieces below 32 MB in its
heap, and how they fragment varies by tens of megabytes: so pieces from 256 KiB are handed back here, as larger ones
of larger models always are, and builds are measured with glibc as it comes too. Writes `results/memory.json`, a table
on standard output and `results/memory.svg`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from allocator.core.budget import Budget, repair
from allocator.core.protocols import Request
from allocator.core.space import Allocation
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.levels.store import StoreBuilder, open_store
from allocator.pruning.pruners.obs import Obs
from allocator.searchers.rules.baselines import uniform

RESULTS = Path(__file__).parent / "results"
BLOCKS = (4, 8, 16)
TOKENS = {"calibration": (8, 256), "search": (4, 256)}
CANDIDATES = 8
Row = dict[str, object]


def spec(folder: Path) -> EngineSpec:
    checkpoint = read_checkpoint(folder / "model")
    layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
    space = build_space(layout, checkpoint, "structured", 0.5)
    return EngineSpec(
        checkpoint=checkpoint, layout=layout, space=space, store=open_store(folder / "levels", {}), pruner=Obs()
    )


def write_model(folder: Path, blocks: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    # in shards of a few blocks, as large models are
    model.save_pretrained(folder / "model", max_shard_size="20MB")


def tokens(split: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 8192, size=TOKENS[split])


def half(one: EngineSpec) -> Allocation:
    return uniform(one.space, Budget(params=one.space.limit_for(0.5)))


def build_dense(folder: Path) -> None:
    shutil.rmtree(folder / "levels", ignore_errors=True)
    calibration = spec(folder).calibration(Examples.from_ids(tokens("calibration")))
    builder = StoreBuilder(folder / "levels", {})
    builder.finish(builder.fill(prune_on_dense_inputs(calibration)))


def build_path(folder: Path) -> None:
    shutil.rmtree(folder / "levels-path", ignore_errors=True)
    one = spec(folder)
    calibration = one.calibration(Examples.from_ids(tokens("calibration")))
    builder = StoreBuilder(folder / "levels-path", {})
    builder.finish(builder.fill(prune_on_pruned_inputs(calibration, half(one), every_level=True)))


def search(folder: Path) -> None:
    one, ids = spec(folder), tokens("search")
    engine, rng = Engine(one, {"search": Examples.from_ids(ids)}), np.random.default_rng(0)
    limit = Budget(params=one.space.limit_for(0.5))
    for _ in range(CANDIDATES):
        levels = rng.integers([unit.num_levels for unit in one.space.units]).tolist()
        allocation = repair(one.space, levels, limit, rng.permutation(len(levels)).tolist())
        engine.measure(Request(allocation=allocation, tokens=ids.size))


def save(folder: Path) -> None:
    one = spec(folder)
    assert one.store is not None
    save_pruned(half(one), one.checkpoint, one.layout, one.space, one.store, folder / "checkpoint")


@dataclass(frozen=True)
class Role:
    """What a process does.

    Attributes:
        work: Does it, in a folder with the model and, but for builds, the level store.
        what: In words.
        holds: What it should hold at its peak.
        colour: In the figure.
        maps: Whether freed pieces from 256 KiB are handed back at once.
    """

    work: Callable[[Path], None]
    what: str
    holds: str
    colour: str
    maps: bool = True


ROLES = {
    "build_dense": Role(
        build_dense, "building a store on dense inputs", "one block, its Hessians at work, and hidden states", "#0072b2"
    ),
    "build_path": Role(
        build_path,
        "building a store along a path",
        "the block twice, two streams, and what enters an output projection",
        "#56b4e9",
    ),
    "build_dense_heap": Role(
        build_dense, "on dense inputs, glibc as it comes", "the same, and a heap in fragments", "#bbbbbb", maps=False
    ),
    "build_path_heap": Role(
        build_path, "along a path, glibc as it comes", "the same, and a heap in fragments", "#777777", maps=False
    ),
    "save": Role(
        save,
        "saving a plan's checkpoint",
        "one shard of the checkpoint, and the mapped levels that it reads",
        "#e69f00",
    ),
    "search": Role(
        search,
        f"a search worker, {CANDIDATES} allocations measured",
        "the whole model, and output projections of levels it has been at",
        "#d55e00",
    ),
}


def memory(name: str) -> int:
    # not getrusage: its peak survives exec, and so counts the parent's
    return int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10


def run_role(role: str, folder: Path) -> None:
    """Do one thing in a process of its own, and print its peak memory and that of the imports alone."""
    torch.set_num_threads(1)
    assert transformers.LlamaForCausalLM  # imported lazily
    idle = memory("VmHWM")
    ROLES[role].work(folder)
    print(json.dumps({"idle": idle, "peak": memory("VmHWM")}))


def measure(blocks: int, folder: Path) -> list[Row]:
    """Return a row per role for a model of so many blocks."""
    write_model(folder, blocks)
    block_bytes = 4 * sum(unit.params[0] for unit in spec(folder).space.units) / blocks
    found = []
    for name, role in ROLES.items():
        command = [sys.executable, "-m", "benchmarks.memory", "--role", name, "--folder", str(folder)]
        maps = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)} if role.maps else {}
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **maps})
        about = json.loads(result.stdout)
        found.append({
            "role": name,
            "blocks": blocks,
            "block_bytes": round(block_bytes),
            "idle_bytes": about["idle"],
            "grown_bytes": about["peak"] - about["idle"],
        })  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return found


def by_role(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Return megabytes by number of blocks, by role."""
    grouped: dict[str, dict[int, float]] = {}
    for row in rows:
        grouped.setdefault(row["role"], {})[row["blocks"]] = row["grown_bytes"] / 1e6
    return grouped


def slope(by_blocks: dict[int, float]) -> float:
    """Return megabytes per block, by least squares."""
    return float(np.polyfit(list(by_blocks), list(by_blocks.values()), 1)[0])


def table(rows: list[Row]) -> str:
    block_mb = rows[0]["block_bytes"] / 1e6
    lines = [
        f"| peak above idle, MB | {' | '.join(f'{blocks} blocks' for blocks in BLOCKS)} | MB per block "
        f"| of a block's {block_mb:.1f} MB | it holds |",
        f"|---|{'---|' * len(BLOCKS)}---|---|---|",
    ]
    for name, by_blocks in by_role(rows).items():
        figures = " | ".join(f"{by_blocks[blocks]:.0f}" for blocks in BLOCKS)
        each = slope(by_blocks)
        lines.append(f"| {ROLES[name].what} | {figures} | {each:.2f} | {each / block_mb:.0%} | {ROLES[name].holds} |")
    return "\n".join(lines)


def figure(rows: list[Row]) -> Figure:
    picture = Figure(figsize=(8.4, 3), layout="constrained")
    axes = picture.subplots()
    for name, by_blocks in by_role(rows).items():
        label = f"{ROLES[name].what}: {slope(by_blocks):.1f} MB per block"
        axes.plot(list(by_blocks), list(by_blocks.values()), "o-", color=ROLES[name].colour, label=label)
    blocks = np.array(BLOCKS)
    axes.plot(blocks, blocks * rows[0]["block_bytes"] / 1e6, "k:", lw=1, label="the blocks in float32")
    axes.set_xticks(BLOCKS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks", fontsize=8)
    axes.set_ylabel("peak memory above idle, MB", fontsize=8)
    picture.legend(fontsize=7, frameon=False, loc="outside right center")
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        run_role(arguments.role, arguments.folder)
        return
    rows: list[Row] = []
    for blocks in BLOCKS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(blocks, Path(folder))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")
    figure(rows).savefig(RESULTS / "memory.svg", metadata={"Date": None})
    print(table(rows))


if __name__ == "__main__":
    main()
