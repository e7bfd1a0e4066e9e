"""Pruning the units of a model, block by block, from calibration text.

Every block is pruned from what reaches it, and that depends on what became of the blocks before it:

- ``dense``: they are whole. Blocks are then independent of each other.
- ``expected``: they are at every level at once: a sub-block adds the average over its levels, weighted by what each
  keeps (Týr-the-Pruner, eq. 5). Inside a sub-block of several matrices the first ones are whole.
- ``path``: they are at the levels of one allocation: true error accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from allocator.core.space import Allocation
from allocator.model.live.memory import give_back
from allocator.pruning.calibration.problem import Calibration, Solve, find_routers, plan_stages
from allocator.pruning.calibration.statistics import collect_statistics
from allocator.pruning.calibration.streams import DenseAndPruned
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.pruners.protocol import UnitProblem

Known = Callable[[str], CompactLevels | None]
"""Compact levels of a unit that was pruned before, or None."""


@torch.inference_mode()
def prune_on_dense_inputs(
    calibration: Calibration, blocks: Collection[int] | None = None, solve: Solve | None = None
) -> Iterator[tuple[str, CompactLevels]]:
    """Yield compact levels of the units of some blocks, pruned from what dense predecessors produce.

    Args:
        calibration: What to prune, on which text.
        blocks: Blocks to prune; None for all. Others only pass the text on.
        solve: Solves problems; None for one after the other, here.
    """
    walker, solve = calibration.walker, solve or _one_by_one(calibration)
    chosen = set(range(len(walker.blocks)) if blocks is None else blocks)
    hidden = calibration.embedded() if chosen else []
    for index, block in enumerate(plan_stages(calibration.layout, calibration.space)):
        if index > max(chosen, default=-1):
            break
        tasks = [task for stage in block for task in stage.tasks] if index in chosen else []
        with walker.loaded(index):
            modules = [task.module for task in tasks]
            with collect_statistics(walker.model, modules, calibration.pruner.need, find_routers(tasks)) as statistics:
                hidden = [walker.run(index, batch) for batch in hidden]
        problems = []
        for task in tasks:
            weight, every = calibration.dense_weight(task), tuple(range(1, task.unit.num_levels))
            problems.append(
                UnitProblem(
                    task=task,
                    weight_oi=weight,
                    statistics=statistics[task.module],
                    levels=every,
                    dtype=weight.dtype,
                )
            )
        for task, found in zip(tasks, solve(problems), strict=True):
            yield task.unit.name, found
        calibration.progress(index + 1)
        give_back()


@torch.inference_mode()
def prune_on_pruned_inputs(
    calibration: Calibration,
    along: Allocation | None,
    every_level: bool,
    known: Known = lambda name: None,
    solve: Solve | None = None,
) -> Iterator[tuple[str, CompactLevels]]:
    """Yield compact levels of every unit, pruned from what pruned predecessors produce.

    Args:
        calibration: What to prune, on which text.
        along: The allocation of the predecessors; None for the expectation over all their levels.
        every_level: Whether every level is made, or that of ``along`` alone.
        known: Answers for units that were pruned before; they are not pruned, nor yielded, again.
        solve: Solves problems; None for one after the other, here.
    """
    space, solve = calibration.space, solve or _one_by_one(calibration)
    levels = None if along is None else {u.name: level for u, level in zip(space.units, along, strict=True)}
    pruned = dense = calibration.embedded()
    told = False
    for index, block in enumerate(plan_stages(calibration.layout, space)):
        with calibration.walker.loaded(index):
            streams = DenseAndPruned(calibration, index, dense, pruned, levels)
            if not streams.adds_up and not told:  # other blocks are made alike
                told = True
                calibration.notify(
                    f"{calibration.layout.blocks[index]}: its output is not its input plus what its sub-blocks add, "
                    "so that refits of output projections cannot make up for what the residual stream lacks"
                )
            for stage in block:
                wanted = {}
                for task in stage.tasks:
                    if (found := known(task.unit.name)) is not None:
                        streams.compact[task.unit.name] = found
                    elif levels is None or every_level:
                        wanted[task] = tuple(range(1, task.unit.num_levels))
                    elif levels[task.unit.name]:
                        wanted[task] = (levels[task.unit.name],)
                for task, found in zip(wanted, solve(streams.problems(stage, wanted)), strict=True):
                    streams.compact[task.unit.name] = found
                    yield task.unit.name, found
                streams.settle(stage)
            dense, pruned = streams.leaving()
            del streams  # the next block's takes its place in memory
        calibration.progress(index + 1)
        give_back()


def _one_by_one(calibration: Calibration) -> Solve:
    return lambda problems: [problem.solve(calibration.pruner, calibration.notify) for problem in problems]
