"""Pruning the units of a model, block by block, from calibration text.

Every block is pruned from the hidden states that enter it. The levels of the earlier blocks determine these states:

- ``dense``: the earlier blocks are dense. Pruning one block thus does not affect the pruning of another.
- ``expected``: every earlier sub-block adds the average of its outputs over all levels. The weight of a level is the
  share that it keeps (Týr-the-Pruner, eq. 5). In a sub-block of several matrices, later matrices are pruned on the
  outputs of the dense first matrices.
- ``path``: the earlier blocks are at the levels of one allocation. Errors thus accumulate as in the pruned model.
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
"""Returns the compact levels of a unit that was pruned before, or None."""


@torch.inference_mode()
def prune_on_dense_inputs(
    calibration: Calibration, blocks: Collection[int] | None = None, solve: Solve | None = None
) -> Iterator[tuple[str, CompactLevels]]:
    """Yield the compact levels of the units of some blocks, pruned on the outputs of dense predecessors.

    Args:
        calibration: The model, the pruner and the text.
        blocks: Indices of the blocks to prune; None for all. The other blocks run, but are not pruned.
        solve: Solves the pruning problems. None solves them one after the other in this process.
    """
    walker, solve = calibration.walker, solve or _solve_in_order(calibration)
    chosen = set(range(len(walker.blocks)) if blocks is None else blocks)
    hidden = calibration.embed() if chosen else []
    for index, stages in enumerate(plan_stages(calibration.layout, calibration.space)):
        if index > max(chosen, default=-1):
            break
        tasks = [task for stage in stages for task in stage.tasks] if index in chosen else []
        with walker.loaded(index):
            modules = [task.module for task in tasks]
            need, routers = calibration.pruner.need, find_routers(tasks)
            with collect_statistics(walker.model, modules, need, routers) as statistics:
                hidden = [walker.run(index, batch) for batch in hidden]
        problems = []
        for task in tasks:
            weight_oi = calibration.read_weight(task)
            problems.append(
                UnitProblem(
                    task=task,
                    weight_oi=weight_oi,
                    statistics=statistics[task.module],
                    levels=tuple(range(1, task.unit.num_levels)),
                    dtype=weight_oi.dtype,
                )
            )
        for task, compact in zip(tasks, solve(problems), strict=True):
            yield task.unit.name, compact
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
    """Yield the compact levels of every unit, pruned on the outputs of pruned predecessors.

    Args:
        calibration: The model, the pruner and the text.
        along: The allocation of the predecessors; None for the expectation over all their levels.
        every_level: Whether to make every level. If not, only the level in ``along`` is made.
        known: Returns units that were pruned before. They are neither pruned nor yielded again.
        solve: Solves the pruning problems. None solves them one after the other in this process.
    """
    space, solve = calibration.space, solve or _solve_in_order(calibration)
    path = None if along is None else {u.name: level for u, level in zip(space.units, along, strict=True)}
    pruned = dense = calibration.embed()
    warned = False
    for index, stages in enumerate(plan_stages(calibration.layout, space)):
        with calibration.walker.loaded(index):
            streams = DenseAndPruned(calibration, index, dense, pruned, path)
            if not streams.adds_up and not warned:  # once, because a model's blocks are alike
                warned = True
                calibration.notify(
                    f"{calibration.layout.blocks[index]}: its output is not its input plus the outputs of its "
                    "sub-blocks. Refits of output projections thus cannot correct earlier errors of the residual stream"
                )
            for stage in stages:
                levels = {}
                for task in stage.tasks:
                    if (compact := known(task.unit.name)) is not None:
                        streams.compact[task.unit.name] = compact
                    elif path is None or every_level:
                        levels[task] = tuple(range(1, task.unit.num_levels))
                    elif path[task.unit.name]:
                        levels[task] = (path[task.unit.name],)
                for task, compact in zip(levels, solve(streams.problems(stage, levels)), strict=True):
                    streams.compact[task.unit.name] = compact
                    yield task.unit.name, compact
                streams.apply(stage)
            dense, pruned = streams.run()
            del streams  # frees the copy of this block before the next one is made
        calibration.progress(index + 1)
        give_back()


def _solve_in_order(calibration: Calibration) -> Solve:
    return lambda problems: [problem.solve(calibration.pruner, calibration.notify) for problem in problems]
