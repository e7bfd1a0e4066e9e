"""What is pruned: a model with its calibration text, and its units in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from allocator.core.errors import UserError
from allocator.core.notify import Notify, Progress, ignore_progress, silent
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
    """Units of one block that are pruned at the same time: no unit changes the inputs of another.

    Attributes:
        sub_blocks: The sub-blocks of the units: one, or several whose sum is added to the residual stream.
        tasks: The units.
        writes: Whether this is the last stage of these sub-blocks, so that what they add is known after it.
    """

    sub_blocks: tuple[SubBlock, ...]
    tasks: tuple[UnitTask, ...]
    writes: bool

    @property
    def sub_block(self) -> SubBlock:
        """The only sub-block of a stage that has one."""
        (sub_block,) = self.sub_blocks
        return sub_block

    @property
    def routed(self) -> bool:
        """Whether a router decides which tokens reach these sub-blocks, so that none has a target of its own."""
        return self.sub_blocks[0].routed is not None

    @property
    def adds(self) -> str:
        """Name of the module whose output these sub-blocks add to the residual stream."""
        return self.sub_blocks[0].routed or self.sub_blocks[0].output


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model to prune, and the text on which it is pruned.

    Attributes:
        walker: The dense model.
        checkpoint: The same model on disk.
        layout: Its sub-blocks.
        space: Its units and their ladders.
        pruner: The local pruner.
        examples: The calibration text, or other examples, as tensors.
        progress: Called with the number of blocks that are done.
        notify: Called with a message for the user.
    """

    walker: BlockWalker
    checkpoint: Checkpoint
    layout: Layout
    space: SearchSpace
    pruner: LocalPruner
    examples: Examples
    progress: Progress = ignore_progress
    notify: Notify = silent

    def embed(self) -> list[torch.Tensor]:
        """Return the hidden states that enter the first block, batch by batch."""
        return [self.walker.embed(batch) for batch in self.examples.split(SEQUENCES_PER_BATCH)]

    def read_weight(self, task: UnitTask) -> torch.Tensor:
        """Read the dense weight of a task's matrix, in the checkpoint's data type.

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
"""Solves problems that do not depend on each other, in this process or elsewhere; results in order."""


def find_routers(tasks: Iterable[UnitTask]) -> dict[str, str]:
    """Return the routers of units that are whole experts, each with the name of its experts."""
    return {task.module: task.experts for task in tasks if task.experts is not None}


def plan_stages(layout: Layout, space: SearchSpace) -> list[list[PruneStage]]:
    """Return the stages of every block, in the order of the forward pass."""
    units = {unit.name: unit for unit in space.units}
    by_block: list[list[PruneStage]] = [[] for _ in layout.blocks]
    structured = space.pattern == "structured"
    for _, group in groupby(layout.sub_blocks, lambda sub_block: (sub_block.block, sub_block.routed or sub_block.name)):
        sub_blocks = tuple(group)
        inner: list[UnitTask] = []
        last: list[UnitTask] = []
        for sub_block in sub_blocks:
            if sub_block.experts:
                (router,) = sub_block.rows
                last.append(UnitTask(units[sub_block.name], router, sub_block.width, sub_block.name))
            elif structured:
                last.append(UnitTask(units[sub_block.name], sub_block.output, sub_block.width))
            else:
                inner += [UnitTask(units[module], module, 1) for module in sub_block.rows]
                last.append(UnitTask(units[sub_block.output], sub_block.output, 1))
        first = [PruneStage(sub_blocks, tuple(inner), writes=False)] if inner else []
        by_block[sub_blocks[0].block] += [*first, PruneStage(sub_blocks, tuple(last), writes=True)]
    return by_block
