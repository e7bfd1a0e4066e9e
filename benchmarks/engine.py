"""What one evaluation costs: against its floor, against the peers' way, as a batch, as a switch; and a store.

    python -m benchmarks.engine --model both

Each part returns rows. Ratios are taken side by side in one run, as medians of interleaved repeats, on one
thread. Seconds are the process's CPU seconds, for the machine may be shared. Writes `results/engine.json`, a
table on standard output and `results/engine.svg`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch.nn import functional

from allocator.core.budget import Budget, repair
from allocator.core.protocols import Request
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation import trie
from allocator.evaluation.engine import Engine
from allocator.evaluation.loss import divergence
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import PACKAGED, locate, read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.walk import SEQUENCES_PER_BATCH
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.levels.compact import item_columns
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.levels.store import StoreBuilder
from allocator.pruning.pruners.obs import Obs
from allocator.searchers.methods.evolution import exchange
from benchmarks import store_build

RESULTS = Path(__file__).parent / "results"
SHARES = (0.25, 0.5, 0.75)
STORE_TOKENS = 4096
Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """A model with its store, and the tokens of one evaluation."""

    name: str
    spec: EngineSpec
    tokens: np.ndarray
    repeats: int

    @property
    def space(self) -> SearchSpace:
        return self.spec.space

    def engine(self) -> Engine:
        return Engine(self.spec, {"search": Examples.from_ids(self.tokens)})

    def request(self, allocation: Allocation) -> Request:
        return Request(allocation=allocation, tokens=self.tokens.size)

    def random(self, share: float, seed: int) -> Allocation:
        """A random allocation that removes ``share`` of the units' parameters."""
        rng = np.random.default_rng([seed, int(100 * share)])
        levels = rng.integers([unit.num_levels for unit in self.space.units]).tolist()
        limit = Budget(params=self.space.limit_for(share))
        return repair(self.space, levels, limit, rng.permutation(len(levels)).tolist())


def make_case(name: str, folder: Path) -> Case:
    model = locate(PACKAGED) if name == "packaged" else random_model(folder / "model")
    sequences, length, repeats = (4, 512, 5) if name == "packaged" else (4, 128, 2)
    checkpoint = read_checkpoint(model)
    layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
    space = build_space(layout, checkpoint, "structured", 0.5)
    vocabulary = checkpoint.config["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, size=(8, length))
    calibration = EngineSpec(checkpoint=checkpoint, layout=layout, space=space, pruner=Obs()).calibration(
        Examples.from_ids(tokens)
    )
    builder = StoreBuilder(folder / "levels", {})
    store = builder.finish(builder.fill(prune_on_dense_inputs(calibration)))
    return Case(
        name, EngineSpec(checkpoint=checkpoint, layout=layout, space=space, store=store), tokens[:sequences], repeats
    )


def random_model(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def floor(case: Case, scratch: Path) -> list[Row]:
    """A candidate, its switch included, against the forward pass of its checkpoint with the same loss."""
    engine, rows = case.engine(), []
    engine.measure(case.request(case.space.dense))
    batches = engine._teacher.batches("search", case.tokens.size, "kl")

    def plain(model: torch.nn.Module) -> None:
        for batch in batches:
            targets = batch.kept or engine._teacher._targets(batch)
            tokens_bt = batch.examples.inputs["input_ids"]
            logits_btv = model(tokens_bt, use_cache=False).logits
            divergence(targets, logits_btv, lambda logits_nv: logits_nv, tokens_bt)

    for share in SHARES:
        allocations = [case.random(share, seed) for seed in range(3)]
        models = []
        for index, allocation in enumerate(allocations):
            out = scratch / f"{case.name}-{share}-{index}"
            save_pruned(allocation, case.spec.checkpoint, case.spec.layout, case.space, case.spec.store, out)
            models.append(load_model(read_checkpoint(out)))
        ratios, ours = [], []
        with torch.inference_mode():
            for repeat in range(case.repeats + 1):
                for allocation, model in zip(allocations, models, strict=True):
                    own = _seconds(lambda a=allocation: engine.measure(case.request(a)))
                    other = _seconds(lambda m=model: plain(m))
                    if repeat:  # the first round warms up
                        ours.append(own)
                        ratios.append(own / other)
        rows.append(
            _row(
                case,
                f"candidate ÷ its checkpoint's forward, {share:.0%} removed",
                median(ratios),
                1.15,
                "<=",
                f"{1000 * median(ours):.0f} ms a candidate",
            )
        )
    return rows


def peers(case: Case, scratch: Path) -> list[Row]:
    """Against dense shapes with zero columns, full logits, and changed weights read again for each candidate."""
    share = 0.5
    allocations = [case.random(share, seed) for seed in range(4)]
    job = scratch / f"{case.name}-peers"
    job.mkdir()
    np.save(job / "tokens.npy", case.tokens)
    (job / "job.json").write_text(json.dumps({
        "model": str(case.spec.checkpoint.folder), "store": str(case.spec.store.folder), "allocations": allocations,
    }))  # fmt: skip
    _write_masked(case, job)
    found: dict[str, list[dict]] = {"ours": [], "peers": []}
    for _ in range(2):
        for side, results in found.items():
            command = [sys.executable, "-m", "benchmarks.engine", "--side", side, "--job", str(job)]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    seconds = {side: median(s for result in results for s in result["seconds"]) for side, results in found.items()}
    ideal = _macs(case, case.space.dense) / np.mean([_macs(case, a) for a in allocations])
    notes = [
        f"{side}: {1000 * seconds[side]:.0f} ms, {results[0]['read_bytes'] / 1e6:.1f} MB read a candidate, "
        f"{median(r['peak_bytes'] for r in results) / 1e6:.0f} MB peak"
        for side, results in found.items()
    ]
    note = f"MACs dense ÷ pruned {ideal:.2f}; {'; '.join(notes)}"
    return [
        _row(
            case,
            "speed-up over the peers' way, 50% removed",
            seconds["peers"] / seconds["ours"],
            0.9 * ideal,
            ">=",
            note,
        )
    ]


def _write_masked(case: Case, job: Path) -> None:
    """Write every level of every output projection in its dense shape, a file each, as the peers keep them."""
    for sub_block, unit in zip(case.spec.layout.sub_blocks, case.space.units, strict=True):
        compact = case.spec.store(unit.name)
        like = case.spec.checkpoint.shapes[f"{sub_block.output}.weight"]
        for level in range(1, unit.num_levels):
            weight = torch.zeros(like, dtype=torch.bfloat16)
            if unit.kept[level]:
                columns = item_columns(compact["order"][: unit.kept[level]].long(), sub_block.width)
                weight[:, columns] = compact[f"output.{level}"].to(weight.dtype)
            save_file({"weight": weight}, job / f"{unit.name}.{level}.safetensors")


def run_side(side: str, job: Path) -> None:
    """Measure candidates in a process of its own, and print seconds, bytes read and the growth of memory."""
    about = json.loads((job / "job.json").read_text())
    tokens = np.load(job / "tokens.npy")
    allocations = [tuple(allocation) for allocation in about["allocations"]]
    checkpoint = read_checkpoint(Path(about["model"]))
    layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
    space = build_space(layout, checkpoint, "structured", 0.5)
    before = _memory("VmRSS")
    measure = (_ours if side == "ours" else _peers)(checkpoint, layout, space, Path(about["store"]), job, tokens)
    seconds, read = [], []
    for allocation in [*allocations, *allocations]:
        start = time.process_time()
        read.append(measure(allocation))
        seconds.append(time.process_time() - start)
    grown = _memory("VmHWM") - before
    print(json.dumps({"seconds": seconds[len(allocations) :], "read_bytes": np.mean(read), "peak_bytes": grown}))


def _memory(name: str) -> int:
    # not getrusage: its peak survives exec, and so counts the parent's
    return int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10


def _ours(checkpoint, layout, space, store, job, tokens) -> Callable[[Allocation], int]:
    from allocator.pruning.levels.store import open_store

    levels = open_store(store, {})
    engine = Engine(
        EngineSpec(checkpoint=checkpoint, layout=layout, space=space, store=levels),
        {"search": Examples.from_ids(tokens)},
    )
    engine.measure(Request(allocation=space.dense, tokens=tokens.size))
    seen: set[tuple[str, int]] = set()

    def measure(allocation: Allocation) -> int:
        engine.measure(Request(allocation=allocation, tokens=tokens.size))
        new = {(u.name, lv) for u, lv in zip(space.units, allocation, strict=True) if lv and u.kept[lv]} - seen
        seen.update(new)
        return sum(levels(name)[f"output.{level}"].nbytes for name, level in new)

    return measure


def _peers(checkpoint, layout, space, store, job, tokens) -> Callable[[Allocation], int]:
    torch.set_num_threads(1)
    model = load_model(checkpoint)
    batches = torch.from_numpy(tokens).split(SEQUENCES_PER_BATCH)
    with torch.inference_mode():
        teacher = [model(batch, use_cache=False).logits for batch in batches]
    outputs = [model.get_submodule(sub_block.output).weight for sub_block in layout.sub_blocks]
    dense = [weight.clone() for weight in outputs]
    before: list[int] = [0] * len(outputs)

    @torch.inference_mode()
    def measure(allocation: Allocation) -> int:
        read = 0
        for index, (unit, level) in enumerate(zip(space.units, allocation, strict=True)):
            if before[index] == level:
                continue
            before[index] = level
            weight = load_file(job / f"{unit.name}.{level}.safetensors")["weight"] if level else dense[index]
            read += weight.nbytes if level else 0
            outputs[index].copy_(weight)
        for batch, teacher_btv in zip(batches, teacher, strict=True):
            own, other = (x.flatten(0, 1).log_softmax(-1) for x in (model(batch, use_cache=False).logits, teacher_btv))
            float(functional.kl_div(own, other, reduction="batchmean", log_target=True))
        return read

    return measure


def batches(case: Case, scratch: Path) -> list[Row]:
    """A batch as a trie against one by one, beside the bound of the multiply-accumulates that are not computed."""
    engine, space = case.engine(), case.space
    parent = case.random(0.5, 0)
    limit, rng = Budget(params=space.limit_for(0.5)), np.random.default_rng(0)
    offspring: dict[Allocation, None] = {}
    while len(offspring) < 32:
        offspring[exchange(space, parent, limit, rng, int(rng.integers(1, 4, size=2).min()))] = None
    steps = [(i, level + by) for i, level in enumerate(parent) for by in (-1, 1)]
    profile = [(*parent[:i], level, *parent[i + 1 :]) for i, level in steps if 0 <= level < space.units[i].num_levels]
    engine.measure(case.request(space.dense))
    rows = []
    for name, allocations in (("32 exchange offspring", list(offspring)), ("a single-unit profile", profile)):
        requests = [case.request(allocation) for allocation in allocations]
        shuffled = [requests[i] for i in rng.permutation(len(requests))]
        ratios = []
        for _ in range(max(2, case.repeats // 2)):
            together = _seconds(lambda r=requests: list(engine.measure_batch(r)))
            alone = _seconds(lambda r=shuffled: [engine.measure(request) for request in r])
            ratios.append(alone / together)
        bound = _bound(case, engine, allocations)
        rows.append(
            _row(
                case,
                f"speed-up of {name} as a trie",
                median(ratios),
                0.9 * bound,
                ">=",
                f"bound {bound:.2f}, reached {median(ratios) / bound:.0%} of it",
            )
        )
    return rows


def _bound(case: Case, engine: Engine, allocations: Sequence[Allocation]) -> float:
    """Return multiply-accumulates one by one ÷ as a trie; the head and the loss are always computed.

    The loss has none: it counts as the head's, times its time over the head's.
    """
    walker = engine._walker
    batches = engine._teacher.batches("search", case.tokens.size, "kl")
    width = case.spec.checkpoint.config["hidden_size"]
    hidden = [torch.randn(*batch.examples.inputs["input_ids"].shape, width) for batch in batches]
    pairs = list(zip(batches, hidden, strict=True))
    judging, heading = [], []
    with torch.inference_mode():
        for _ in range(5):
            judging.append(_seconds(lambda: [engine._teacher.score(one, walker, x) for one, x in pairs]))
            heading.append(
                _seconds(lambda: [walker.logits(part) for _, x in pairs for part in x.flatten(0, 1).split(256)])
            )
    always = case.space.fixed["macs"] * median(judging) / median(heading)
    blocks = range(len(walker.blocks))
    alone = sum(always + sum(_block_macs(case, a, block) for block in blocks) for a in allocations)
    steps = trie.plan([engine._path(case.request(a)) for a in allocations], len(blocks))
    together = sum(
        always + sum(_block_macs(case, allocations[step.index], block) for block in blocks[step.start :])
        for step in steps
    )
    return alone / together


def _macs(case: Case, allocation: Allocation) -> float:
    """Return multiply-accumulates per token, the head's and those of attention scores included."""
    blocks = range(len(case.spec.layout.blocks))
    return case.space.fixed["macs"] + sum(_block_macs(case, allocation, block) for block in blocks)


def _block_macs(case: Case, allocation: Allocation, block: int) -> float:
    macs = 0.0
    for sub_block, unit, level in zip(case.spec.layout.sub_blocks, case.space.units, allocation, strict=True):
        if unit.block == block:
            # queries times keys and scores times values, of which the causal half counts
            scores = unit.kept[level] * sub_block.width * case.tokens.shape[1] if unit.part == "attention" else 0
            macs += unit.macs[level] + scores
    return macs


def switches(case: Case, scratch: Path) -> list[Row]:
    """One unit from level to level: seconds, and bytes copied of what is not the output projection."""
    engine = case.engine()
    board, model = engine._level_switch, engine._walker.model
    assert board is not None
    first, again, dense, copied = [], [], [], 0
    for sub_block, unit in zip(case.spec.layout.sub_blocks, case.space.units, strict=True):
        levels = [level for level in range(1, unit.num_levels) if unit.kept[level]]
        dense.append(_seconds(lambda n=unit.name, lv=levels[0]: board.set(n, lv)))
        weights = [model.get_submodule(module).weight for module, _ in sub_block.inputs]
        places = [weight.untyped_storage().data_ptr() for weight in weights]
        first += [_seconds(lambda n=unit.name, lv=level: board.set(n, lv)) for level in levels[1:]]
        for _ in range(case.repeats):
            again += [_seconds(lambda n=unit.name, lv=level: board.set(n, lv)) for level in levels]
            copied += sum(
                weight.nbytes
                for weight, place in zip(weights, places, strict=True)
                if weight.untyped_storage().data_ptr() != place
            )
    note = (
        f"{1e6 * median(again):.0f} µs; {1e6 * median(first):.0f} µs where the output projection is read first; "
        f"{1e6 * median(dense):.0f} µs from dense, which permutes rows"
    )
    return [_row(case, "bytes of gate, up, q, k, v copied by a level switch", copied, 0, "<=", note)]


def stores(case: Case, scratch: Path) -> list[Row]:
    """A level store: one deep pass against a solve per level, and its bytes against dense-shaped levels."""
    vocabulary, length = case.spec.checkpoint.config["vocab_size"], case.tokens.shape[1]
    # enough tokens for a Hessian of full rank
    tokens = np.random.default_rng(1).integers(0, vocabulary, size=(-(-STORE_TOKENS // length), length))
    blocks = range(len(case.spec.layout.blocks)) if case.name == "packaged" else range(1)
    found = store_build.measure(case.spec, torch.from_numpy(tokens), blocks, case.repeats // 2 or 1, scratch)
    return [_row(case, one.what, one.value, one.target, one.relation, one.note) for one in found]


PARTS: dict[str, Callable[[Case, Path], list[Row]]] = {
    "floor": floor,
    "peers": peers,
    "batches": batches,
    "switches": switches,
    "stores": stores,
}


def _row(case: Case, what: str, value: float, target: float, relation: str, note: str) -> Row:
    met = value <= target if relation == "<=" else value >= target
    row = {"model": case.name, "what": what, "value": round(float(value), 4), "relation": relation}
    return {**row, "target": round(float(target), 4), "met": bool(met), "note": note}


def table(rows: Sequence[Row]) -> str:
    lines = ["| model | what | measured | target | met | |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['what']} | {row['value']:.3g} | {row['relation']} {row['target']:.3g} "
            f"| {'yes' if row['met'] else 'no'} | {row['note']} |"
        )
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> Figure:
    shown = [row for row in rows if row["target"] and row["value"]][::-1]
    picture = Figure(figsize=(7.2, 0.6 + 0.3 * len(shown)), layout="constrained")
    axes = picture.subplots()
    for index, row in enumerate(shown):
        axes.barh(index, row["value"], color="#0072b2" if row["met"] else "#d55e00", height=0.6)
        axes.plot([row["target"]] * 2, [index - 0.4, index + 0.4], "k-", lw=1.5)
    axes.set_yticks(range(len(shown)), [f"{row['what']} ({row['model']})" for row in shown], fontsize=7)
    axes.set_xlabel("measured ratio; the line is the target", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["packaged", "d768", "both"], default="both")
    parser.add_argument("--what", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--side", choices=["ours", "peers"], help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.job)
        return
    rows: list[Row] = []
    for name in ("packaged", "d768") if arguments.model == "both" else (arguments.model,):
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(name, Path(folder))
            for part in arguments.what:
                rows += PARTS[part](case, Path(folder))
                print(table(rows), file=sys.stderr, flush=True)
    RESULTS.mkdir(exist_ok=True)
    place = RESULTS / "engine.json"
    done = {(row["model"], row["what"]) for row in rows}
    old = json.loads(place.read_text()) if place.exists() else []
    rows = [*(row for row in old if (row["model"], row["what"]) not in done), *rows]
    place.write_text(json.dumps(rows, indent=1) + "\n")
    figure(rows).savefig(RESULTS / "engine.svg", metadata={"Date": None})
    print(table(rows))


if __name__ == "__main__":
    main()
