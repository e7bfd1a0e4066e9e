"""What is to be pruned: units in the order of the forward pass, and what a local pruner is given for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from allocator.core.errors import UserError
from allocator.core.notify import Notify, Progress, silent
from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import Layout
from allocator.model.family.sub_blocks import SubBlock
from allocator.model.live.walk import SEQUENCES_PER_BATCH, BlockWalker
from allocator.model.live.write import read_tensors
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.pruners.protocol import LocalPruner, UnitProblem, UnitTask


@dataclass(frozen=True, slots=True)
class PruneStage:
    """Units that are pruned from inputs that only the stages before have a part in.

    Attributes:
        sub_blocks: Their sub-blocks: one, or several whose sum is added.
        tasks: The units.
        writes: Whether this is the last stage of these sub-blocks, after which it is known what they add.
    """

    sub_blocks: tuple[SubBlock, ...]
    tasks: tuple[UnitTask, ...]
    writes: bool

    @property
    def sub_block(self) -> SubBlock:
        """The sub-block, where there is one."""
        (sub_block,) = self.sub_blocks
        return sub_block

    @property
    def routed(self) -> bool:
        """Whether tokens reach these sub-blocks as a router says, so that none has a target of its own."""
        return self.sub_blocks[0].routed is not None

    @property
    def adds(self) -> str:
        """The module whose output is what these sub-blocks add to the residual stream."""
        return self.sub_blocks[0].routed or self.sub_blocks[0].output


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model to prune, and the text that shows how it is used.

    Attributes:
        walker: The dense model.
        checkpoint: The same model on disk.
        layout: Where its units are.
        space: Their ladders.
        pruner: The local pruner.
        examples: The calibration text, or other examples, as tensors.
        progress: Hears how many blocks are done.
        notify: Hears what a user should know.
    """

    walker: BlockWalker
    checkpoint: Checkpoint
    layout: Layout
    space: SearchSpace
    pruner: LocalPruner
    examples: Examples
    progress: Progress = lambda done: None
    notify: Notify = silent

    def embedded(self) -> list[torch.Tensor]:
        """Return what enters the first block, batch by batch."""
        return [self.walker.embed(batch) for batch in self.examples.split(SEQUENCES_PER_BATCH)]

    def dense_weight(self, task: UnitTask) -> torch.Tensor:
        """Return the dense weight of a task's matrix, in the checkpoint's data type.

        Raises:
            UserError: It holds NaN or infinity.
        """
        name = f"{task.module}.weight"
        weight = read_tensors(self.checkpoint, [name])[name]
        if not torch.isfinite(weight).all():
            raise UserError(
                f"model: {self.checkpoint.folder}: {name} holds NaN or infinity. Repair or replace the model"
            )
        return weight


Solve = Callable[[Sequence[UnitProblem]], list[CompactLevels]]
"""Solves problems that do not depend on each other, wherever it likes."""


def find_routers(tasks: Iterable[UnitTask]) -> dict[str, str]:
    """Return routers whose experts are units, each with the name of its experts."""
    return {task.module: task.experts for task in tasks if task.experts is not None}


def plan_stages(layout: Layout, space: SearchSpace) -> list[list[PruneStage]]:
    """Return the stages of every block, in the order of the forward pass."""
    units = {unit.name: unit for unit in space.units}
    by_block: list[list[PruneStage]] = [[] for _ in layout.blocks]
    structured = space.pattern == "structured"
    for _, group in groupby(layout.sub_blocks, lambda sub_block: (sub_block.block, sub_block.routed or sub_block.name)):
        sub_blocks = tuple(group)
        before: list[UnitTask] = []
        last: list[UnitTask] = []
        for sub_block in sub_blocks:
            if sub_block.experts:
                (router,) = sub_block.rows
                last.append(UnitTask(units[sub_block.name], router, sub_block.width, sub_block.name))
            elif structured:
                last.append(UnitTask(units[sub_block.name], sub_block.output, sub_block.width))
            else:
                before += [UnitTask(units[module], module, 1) for module in sub_block.rows]
                last.append(UnitTask(units[sub_block.output], sub_block.output, 1))
        own = [PruneStage(sub_blocks, tuple(before), writes=False)] if before else []
        by_block[sub_blocks[0].block] += [*own, PruneStage(sub_blocks, tuple(last), writes=True)]
    return by_block
