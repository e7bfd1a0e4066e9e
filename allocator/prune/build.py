"""Pruning every unit of a model, block by block: at all levels for a store, or along one allocation.

Blocks are walked in order with the calibration text's hidden states. A store is built on dense inputs: every
block sees what its dense predecessors produce. Along an allocation, every stage sees what its *pruned*
predecessors produce (true error accumulation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from allocator.core.space import Allocation, SearchSpace, Unit
from allocator.model.checkpoint import read_tensors
from allocator.model.family import Layout
from allocator.model.headers import ModelFiles
from allocator.model.walk import BlockWalker
from allocator.prune.assemble import Assembler, CompactLevels, Switchboard
from allocator.prune.factorise import Report, silent
from allocator.prune.pruners import LocalPruner
from allocator.prune.statistics import collected

SEQUENCES_PER_BATCH = 4
"""Sequences that run together; part of the numerics, so not derived from free memory."""

Progress = Callable[[int], None]
"""Hears how many blocks are done."""


@dataclass(frozen=True, slots=True)
class Task:
    """One unit to prune: the matrix whose inputs matter, and its columns per item."""

    unit: Unit
    module: str
    width: int


def stages(layout: Layout, space: SearchSpace) -> list[list[list[Task]]]:
    """Return tasks by block and stage. Inputs of a stage depend on the stages before it."""
    units = {unit.name: unit for unit in space.units}
    by_block: list[list[list[Task]]] = [[] for _ in layout.blocks]
    for site in layout.sites:
        if space.pattern == "structured":
            by_block[site.block].append([Task(units[site.name], site.output, site.width)])
        else:
            by_block[site.block].append([Task(units[module], module, 1) for module, _ in site.inputs])
            by_block[site.block].append([Task(units[site.output], site.output, 1)])
    return by_block


@torch.inference_mode()
def prune_all_levels(
    walker: BlockWalker,
    files: ModelFiles,
    layout: Layout,
    space: SearchSpace,
    pruner: LocalPruner,
    tokens_nt: torch.Tensor,
    progress: Progress = lambda done: None,
    report: Report = silent,
) -> Iterator[tuple[str, CompactLevels]]:
    """Yield each unit's compact levels, from dense inputs; one pass over the calibration text per block."""
    hidden = [walker.embed(batch) for batch in tokens_nt.split(SEQUENCES_PER_BATCH)]
    for index, block in enumerate(stages(layout, space)):
        tasks = [task for stage in block for task in stage]
        with collected(walker.model, [task.module for task in tasks], pruner.need) as statistics:
            hidden = [walker.run(index, batch) for batch in hidden]
        for task in tasks:
            weight = _weight(files, task)
            wanted = range(1, task.unit.num_levels)
            found = pruner.levels(task.unit, task.width, weight, statistics[task.module], wanted, report)
            yield task.unit.name, stored(found, weight.dtype)
        progress(index + 1)


@torch.inference_mode()
def prune_along(
    allocation: Allocation,
    walker: BlockWalker,
    files: ModelFiles,
    layout: Layout,
    space: SearchSpace,
    pruner: LocalPruner,
    tokens_nt: torch.Tensor,
    progress: Progress = lambda done: None,
    report: Report = silent,
) -> dict[str, CompactLevels]:
    """Return each unit's compact form at its level of ``allocation``, from pruned predecessors' inputs.

    The walker's model is left pruned.
    """
    levels = {unit.name: level for unit, level in zip(space.units, allocation, strict=True)}
    compact: dict[str, CompactLevels] = {}
    assembler = Assembler(files, layout, space, compact.__getitem__, walker.model)
    switchboard = Switchboard(walker.model, layout, assembler)
    hidden = [walker.embed(batch) for batch in tokens_nt.split(SEQUENCES_PER_BATCH)]
    for index, block in enumerate(stages(layout, space)):
        for stage in block:
            with collected(walker.model, [task.module for task in stage], pruner.need) as statistics:
                for batch in hidden:
                    walker.run(index, batch)
            for task in stage:
                level = levels[task.unit.name]
                if level > 0:
                    weight = _weight(files, task)
                    found = pruner.levels(task.unit, task.width, weight, statistics[task.module], [level], report)
                    compact[task.unit.name] = stored(found, weight.dtype)
                    switchboard.set(task.unit.name, level)
        hidden = [walker.run(index, batch) for batch in hidden]
        progress(index + 1)
    return compact


def stored(compact: CompactLevels, dtype: torch.dtype) -> CompactLevels:
    """Return compact levels with their values in the checkpoint's data type."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in compact.items()}


def _weight(files: ModelFiles, task: Task) -> torch.Tensor:
    name = f"{task.module}.weight"
    return read_tensors(files, [name])[name]
