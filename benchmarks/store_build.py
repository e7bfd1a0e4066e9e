"""What a level store costs: one deep pass against a solve per level, and its bytes against dense-shaped levels."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from allocator.core.space import SearchSpace
from allocator.evaluation.spec import EngineSpec
from allocator.model.data.examples import Examples
from allocator.model.family.space import build_space
from allocator.model.live.stream import StreamedWalker
from allocator.model.live.write import read_tensors
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.calibration.factorise import factorise
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.calibration.statistics import Gram
from allocator.pruning.levels.compact import item_columns
from allocator.pruning.levels.store import StoreBuilder
from allocator.pruning.pruners import removal
from allocator.pruning.pruners.obs import Obs
from allocator.pruning.pruners.protocol import LocalPruner, PrunerSpec, UnitProblem
from allocator.pruning.pruners.registry import make_pruner

EIGHT = [step / 9 for step in range(1, 9)]
NINE = [0.5 + 0.075 * step for step in range(-4, 5)]
BYTES = {"obs": 0.3, "sparsegpt": 0.6, "magnitude": 0.2, "wanda": 0.2}
"""Targets of the bytes of each pruner's store, as a share of dense-shaped levels."""


@dataclass(frozen=True)
class Finding:
    """A figure with its target."""

    what: str
    value: float
    target: float
    relation: str
    note: str


def measure(
    spec: EngineSpec, tokens_nt: torch.Tensor, blocks: Collection[int], repeats: int, scratch: Path
) -> list[Finding]:
    """Compare on some blocks of a model."""
    return [*_passes(spec, tokens_nt, blocks, repeats), *_sizes(spec, tokens_nt, blocks, scratch)]


def _space(spec: EngineSpec, pattern: str, sparsities: list[float]) -> SearchSpace:
    return build_space(spec.layout, spec.checkpoint, pattern, 0.5, sparsities)


def _calibration(spec: EngineSpec, space: SearchSpace, pruner: LocalPruner, tokens_nt: torch.Tensor) -> Calibration:
    return Calibration(
        walker=StreamedWalker(spec.checkpoint, spec.layout),
        checkpoint=spec.checkpoint,
        layout=spec.layout,
        space=space,
        pruner=pruner,
        examples=Examples.from_ids(tokens_nt),
    )


def _passes(spec: EngineSpec, tokens_nt: torch.Tensor, blocks: Collection[int], repeats: int) -> list[Finding]:
    """Solve the same problems, eight levels each, by the pruner and level by level; statistics are given to both."""
    obs, problems = Obs(), []

    def keep(given: list[UnitProblem]) -> list[dict[str, torch.Tensor]]:
        kept = [[level for level in one.levels if one.task.unit.kept[level]] for one in given]
        problems.extend(replace(one, levels=tuple(levels)) for one, levels in zip(given, kept, strict=True))
        return [{} for _ in given]

    list(prune_on_dense_inputs(_calibration(spec, _space(spec, "structured", EIGHT), obs, tokens_nt), blocks, keep))
    findings = []
    for kind in ("channels", "kv_groups"):
        chosen = [problem for problem in problems if problem.task.unit.kind == kind]
        deep_s, separate_s, worst = [], [], 0.0
        for _ in range(repeats):
            seconds = [0.0, 0.0]
            for problem in chosen:
                start = time.process_time()
                deep = obs.levels(problem)
                middle = time.process_time()
                separate = {level: _solve(problem, level, obs.refit.damping) for level in problem.levels}
                seconds = [seconds[0] + middle - start, seconds[1] + time.process_time() - middle]
                worst = max(worst, *(_difference(problem, deep, level, separate[level]) for level in problem.levels))
            deep_s.append(seconds[0])
            separate_s.append(seconds[1])
        levels = max(len(problem.levels) for problem in chosen)
        ratio = median(b / a for a, b in zip(deep_s, separate_s, strict=True))
        what = {"channels": "MLPs", "kv_groups": "attention"}[kind]
        note = f"{len(chosen)} units: {median(deep_s):.2f} s against {median(separate_s):.2f} s, statistics not counted"
        # a pass for three levels cannot be three times as fast as three
        target = 3.0 if levels == len(EIGHT) else 1.0
        findings.append(Finding(f"speed-up of one deep pass over {levels} solves, {what}", ratio, target, ">=", note))
        note = f"{worst:.1e} in the Frobenius norm, float64"
        what = f"largest relative difference of refitted weights from {levels} solves, {what}"
        findings.append(Finding(what, worst, 0.01, "<=", note))
    return findings


def _solve(problem: UnitProblem, level: int, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kept columns and their refitted weights for one level, from its own factors and its own greedy pass."""
    task, statistics = problem.task, problem.statistics
    assert isinstance(statistics, Gram)
    weight_oi, gram_ii = problem.weight_oi.double(), statistics.gram_ii.double()
    factor = factorise(gram_ii, damping, task.unit.name, print)
    live_oi = weight_oi * (gram_ii.diagonal() > 0)
    kept = item_columns(_left(live_oi, factor.inverse(), task.width, task.unit.kept[level]), task.width)
    given_ki = factor.gram_ii[kept]
    kept_ko = torch.cholesky_solve(given_ki @ weight_oi.T, torch.linalg.cholesky(given_ki[:, kept]))
    return kept, kept_ko.T


def _left(weight_oi: torch.Tensor, inverse_ii: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Return the items that are left, as :func:`removal.obs_order` removes, stopping when there are ``count``."""
    inverse, square = inverse_ii, weight_oi.T @ weight_oi
    items = torch.arange(len(inverse) // width)
    while len(items) > count:
        steps = min(max(removal._ITEMS, removal._COLUMNS // width), len(items) - count)
        alive = torch.ones(len(items), dtype=torch.bool)
        inverse_mww, square_mww = removal._diagonal(inverse, width), removal._diagonal(square, width)
        spread_pi, change_pi = inverse.new_empty(2, steps * width, len(inverse))
        for step in range(steps):
            index = int(removal._scores(inverse_mww, square_mww).masked_fill_(~alive, torch.inf).argmin())
            own, done = slice(index * width, (index + 1) * width), slice(0, step * width)
            new = slice(step * width, (step + 1) * width)
            inverse_wi = inverse[own] - spread_pi[done, own].T @ spread_pi[done]
            square_wi = square[own] - change_pi[done, own].T @ spread_pi[done]
            square_wi -= spread_pi[done, own].T @ change_pi[done]
            spread_wi, change_wi = removal._factors(inverse_wi, square_wi, own)
            spread_pi[new], change_pi[new] = spread_wi, change_wi
            spread_mww, change_mww = (x.view(width, -1, width).transpose(0, 1) for x in (spread_wi, change_wi))
            inverse_mww -= removal._products(spread_mww, spread_mww)
            cross_mww = removal._products(change_mww, spread_mww)
            square_mww -= cross_mww + cross_mww.mT
            inverse_mww[index] = torch.eye(width)
            alive[index] = False
        items = items[alive]
        if len(items) > count:
            kept = alive.repeat_interleave(width).nonzero().flatten()
            spread_pi, change_pi = spread_pi[:, kept], change_pi[:, kept]
            inverse = inverse[kept][:, kept].addmm_(spread_pi.T, spread_pi, alpha=-1)
            both, swapped = torch.cat([spread_pi, change_pi]), torch.cat([change_pi, spread_pi])
            square = square[kept][:, kept].addmm_(both.T, swapped, alpha=-1)
    return items


def _difference(
    problem: UnitProblem, deep: dict[str, torch.Tensor], level: int, separate: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the relative difference of one level's output projections, in their dense shapes."""
    task, (kept, kept_ok) = problem.task, separate
    own, other = torch.zeros(2, *problem.weight_oi.shape, dtype=torch.float64)
    other[:, kept] = kept_ok
    own[:, item_columns(deep["order"][: task.unit.kept[level]].long(), task.width)] = deep[f"output.{level}"]
    return float((own - other).norm() / other.norm())


def _sizes(spec: EngineSpec, tokens_nt: torch.Tensor, blocks: Collection[int], scratch: Path) -> list[Finding]:
    """Build a store of nine levels with each pruner, and compare its files with levels in their dense shapes."""
    findings = []
    for name, target in BYTES.items():
        pattern = "structured" if name == "obs" else "unstructured"
        space = _space(spec, pattern, NINE)
        calibration = _calibration(spec, space, make_pruner(PrunerSpec(name=name), pattern), tokens_nt)
        start = time.process_time()
        builder = StoreBuilder(scratch / f"sizes-{name}", {})
        store = builder.finish(builder.fill(prune_on_dense_inputs(calibration, blocks)))
        seconds = time.process_time() - start
        own = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
        needed, shaped = _dense_bytes(spec, space, blocks)
        if name == "sparsegpt":
            needed = 0  # all values are the store's own
        note = (
            f"{own / 1e6:.2f} MB and {needed / 1e6:.2f} MB of dense matrices on which levels draw, against "
            f"{shaped / 1e6:.1f} MB; built in {seconds:.1f} s"
        )
        what = f"bytes of 9 levels ÷ in dense shapes, {name}"
        findings.append(Finding(what, (own + needed) / shaped, target, "<=", note))
    return findings


def _dense_bytes(spec: EngineSpec, space: SearchSpace, blocks: Collection[int]) -> tuple[int, int]:
    """Return the bytes of dense matrices on which levels draw, and of all matrices once for every level.

    Structured levels keep their output projections themselves.
    """
    sub_blocks = {sub_block.name: sub_block for sub_block in spec.layout.sub_blocks}
    needed = every = 0
    for unit in space.units:
        if unit.block in blocks:
            sub_block = sub_blocks.get(unit.name)
            sizes = {
                module: read_tensors(spec.checkpoint, [f"{module}.weight"])[f"{module}.weight"].nbytes
                for module in (sub_block.modules if sub_block else [unit.name])
            }
            needed += sum(size for module, size in sizes.items() if not sub_block or module != sub_block.output)
            every += sum(sizes.values()) * (unit.num_levels - 1)
    return needed, every
