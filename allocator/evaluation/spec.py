"""The specification of an engine, and the protocol of evaluators that the commands use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from allocator.core.errors import UserError
from allocator.core.notify import Notify, Progress, ignore_progress, silent
from allocator.core.protocols import AllocationEvaluator
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.loss import Loss
from allocator.evaluation.training import Training
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import Layout
from allocator.model.live.stream import StreamedWalker
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import LevelStore, StoreBuilder
from allocator.pruning.pruners.protocol import LocalPruner, UnitProblem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The data types that an engine computes in, by their names in a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything that an engine is made from. It is valid on any machine that can read the folders.

    Attributes:
        checkpoint: The dense model.
        layout: The sub-blocks of the dense model.
        space: The units of the dense model, and their ladders.
        store: The level store. None for an engine that measures checkpoints only.
        pruner: The local pruner. None for an engine that never prunes.
        dtype: Key of :data:`DTYPES`.
        threads: CPU threads of one evaluation. Their number can change results by rounding.
        loss: The loss of allocations. Checkpoints are always measured by ``kl``, or by ``hidden`` if the model has no
            logits.
        device: ``cpu`` or ``cuda``.
        training: How candidates are trained. None for a search without training.
        domains: Names of the texts, if there are several. Every split takes sequences from each text in turn. The
            loss on each text is also measured separately, as ``<loss>.<domain>``. Empty for one text.
    """

    checkpoint: Checkpoint
    layout: Layout
    space: SearchSpace
    store: LevelStore | None = None
    pruner: LocalPruner | None = None
    dtype: str = "float32"
    threads: int = 1
    loss: Loss = "kl"
    device: str = "cpu"
    training: Training | None = None
    domains: tuple[str, ...] = ()

    def calibration(
        self, examples: Examples, progress: Progress = ignore_progress, notify: Notify = silent
    ) -> Calibration:
        """Return the inputs of a pruning pass.

        Args:
            examples: The calibration examples: text, images or both.
            progress: Called with the number of blocks that are done.
            notify: Called with a message for the user.

        Returns:
            The dense model, loaded block by block from disk, with the pruner and the examples.
        """
        assert self.pruner is not None
        torch.set_num_threads(self.threads)
        walker = StreamedWalker(self.checkpoint, self.layout, DTYPES[self.dtype])
        return Calibration(
            walker=walker,
            checkpoint=self.checkpoint,
            layout=self.layout,
            space=self.space,
            pruner=self.pruner,
            examples=examples.to_tensors(),
            progress=progress,
            notify=notify,
        )


@dataclass(frozen=True, slots=True)
class Execution:
    """An allocation to save as a checkpoint, and how its weights are made.

    Attributes:
        allocation: One level per unit.
        recompute: Whether to prune again, block by block, on the outputs of pruned predecessors. If not, the levels
            come from the store.
        out: The checkpoint's folder. It does not exist yet. Every worker must have access to it.
    """

    allocation: Allocation
    recompute: bool
    out: Path


class Evaluator(AllocationEvaluator, Protocol):
    """Prunes, measures and saves allocations, in this process or on a pool of workers."""

    @property
    def alive(self) -> int:
        """Number of workers that can take a task. 0 for an evaluator in this process."""
        ...

    def renew(self, spec: EngineSpec) -> None:
        """Replace the engines by engines of another specification. The examples stay the same."""
        ...

    def build(self, builder: StoreBuilder, blocks: Sequence[int], progress: Progress) -> None:
        """Prune blocks on dense inputs, and write their units to a store.

        Args:
            builder: The store that is being built.
            blocks: Indices of the blocks to prune.
            progress: Called with the number of blocks that are done.
        """
        ...

    def solve(self, problems: Sequence[UnitProblem]) -> list[CompactLevels]:
        """Return the compact levels of problems that do not depend on each other, in order."""
        ...

    def execute(self, executions: Sequence[Execution], tokens: int) -> list[dict[str, float]]:
        """Save checkpoints, and return the figures of each on the first tokens of the test split, in order."""
        ...

    def close(self) -> None:
        """Release the workers. The evaluator cannot be used afterwards."""
        ...


def check_device(device: str) -> None:
    """Check that this machine has a device.

    Raises:
        UserError: This machine has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device that torch can use. Use --set device=cpu")
