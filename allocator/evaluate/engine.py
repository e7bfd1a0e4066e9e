"""The engine: one live model whose units are switched to an allocation and measured against the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from allocator.core.errors import UserError
from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluate.loss import divergence
from allocator.evaluate.teacher import Lesson, Teacher
from allocator.model.family import Layout
from allocator.model.headers import ModelFiles, read_model_files
from allocator.model.load import load_model
from allocator.model.stream import StreamedWalker
from allocator.model.walk import BlockWalker
from allocator.prune.assemble import Assembler, Switchboard
from allocator.prune.build import prune_on_pruned_inputs
from allocator.prune.execute import save_pruned
from allocator.prune.factorise import Report, silent
from allocator.prune.problem import Calibration, Progress
from allocator.prune.pruners import LocalPruner
from allocator.prune.store import LevelStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is made from, on any machine that sees the folders.

    Attributes:
        files: The dense model.
        layout: Where its units are.
        space: Their ladders.
        store: The level store; None for an engine that only measures checkpoints.
        pruner: The local pruner, for allocations that are recomputed.
        dtype: Key of :data:`DTYPES`.
        threads: CPU threads of one evaluation. Part of the numerics.
    """

    files: ModelFiles
    layout: Layout
    space: SearchSpace
    store: LevelStore | None = None
    pruner: LocalPruner | None = None
    dtype: str = "float32"
    threads: int = 1

    def calibration(
        self, tokens_nt: torch.Tensor, progress: Progress = lambda done: None, report: Report = silent
    ) -> Calibration:
        """Return what pruning works on: the model, block by block from disk, and the calibration text."""
        assert self.pruner is not None
        walker = StreamedWalker(self.files, self.layout, DTYPES[self.dtype])
        return Calibration(walker, self.files, self.layout, self.space, self.pruner, tokens_nt, progress, report)


@dataclass(frozen=True, slots=True)
class Execution:
    """An allocation to save as a checkpoint, and how to make its weights.

    Attributes:
        allocation: One level per unit.
        recompute: Prune block by block on what pruned predecessors produce, in place of the store's levels.
        out: The checkpoint's folder, which does not exist yet; every worker must reach it.
    """

    allocation: Allocation
    recompute: bool
    out: Path


class Engine:
    """Measures allocations on token sequences. One model, one device, no state between measurements."""

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, np.ndarray]) -> None:
        """Load the model.

        Args:
            spec: What to load.
            tokens: Token ids [sequences, length] of each split; a fidelity is a prefix of the sequences.
        """
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._tokens = {split: torch.from_numpy(np.array(ids, dtype=np.int64)) for split, ids in tokens.items()}
        self._walker = BlockWalker(load_model(spec.files, DTYPES[spec.dtype]), spec.layout)
        self._switchboard: Switchboard | None = None
        if spec.store is not None:
            assembler = Assembler(spec.files, spec.layout, spec.space, spec.store, DTYPES[spec.dtype])
            self._switchboard = Switchboard(self._walker.model, spec.layout, assembler)
        self._teacher = Teacher(self._walker, self._tokens)

    def measure(self, request: Request) -> Outcome:
        """Return the KL from the dense model and the negative log-likelihood of an allocation."""
        start = time.perf_counter()
        lessons = self._lessons(request.split, request.tokens)
        self._switch(request.allocation)
        measured = self._compare(self._walker, lessons)
        return Outcome(request, measured, time.perf_counter() - start)

    def measure_checkpoint(self, folder: Path, split: str, tokens: int) -> dict[str, float]:
        """Load a saved checkpoint and measure it as :meth:`measure` does."""
        walker = BlockWalker(load_model(read_model_files(folder), DTYPES[self._spec.dtype]), self._spec.layout)
        measured = self._compare(walker, self._lessons(split, tokens))
        return {**measured, "perplexity": math.exp(measured["nll"])}

    def execute(self, execution: Execution, tokens: int) -> dict[str, float]:
        """Save a checkpoint, reload it, count its parameters and measure it on the test split."""
        spec = self._spec
        if execution.recompute:
            assert spec.pruner is not None
            compact = dict(
                prune_on_pruned_inputs(spec.calibration(self._tokens["calibration"]), execution.allocation, False)
            ).__getitem__
        else:
            assert spec.store is not None
            compact = spec.store
        params = save_pruned(execution.allocation, spec.files, spec.layout, spec.space, compact, execution.out)
        return {"params": params, **self.measure_checkpoint(execution.out, "test", tokens)}

    def _compare(self, walker: BlockWalker, lessons: Sequence[Lesson]) -> dict[str, float]:
        kl = nll = 0.0
        for lesson in lessons:
            own = walker is self._walker
            student_btd = walker.run_all(lesson.embedded_btd if own else walker.embed(lesson.tokens_bt))
            taught = self._teacher.targets(lesson)
            batch_kl, batch_nll = divergence(taught, student_btd, walker.logits, lesson.tokens_bt)
            kl, nll = kl + batch_kl, nll + batch_nll
        positions = sum(lesson.tokens_bt.numel() for lesson in lessons)
        sequences = sum(len(lesson.tokens_bt) for lesson in lessons)
        measured = {"kl": kl / positions, "nll": nll / (positions - sequences)}
        if not all(math.isfinite(value) for value in measured.values()):
            raise UserError(
                f"evaluation: the loss is not finite ({measured}). Check the weights, or use --set dtype=float32"
            )
        return measured

    def _lessons(self, split: str, tokens: int) -> list[Lesson]:
        if not self._teacher.knows(split, tokens):
            self._switch(self._spec.space.dense)
        return self._teacher.lessons(split, tokens)

    def _switch(self, allocation: Sequence[int]) -> None:
        if self._switchboard is not None:
            for unit, level in zip(self._spec.space.units, allocation, strict=True):
                self._switchboard.set(unit.name, level)


class LocalEvaluator:
    """Measures in this process, one request after the other."""

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, np.ndarray]) -> None:
        self._engine = Engine(spec, tokens)

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes in the order of requests."""
        for request in requests:
            yield self._engine.measure(request)

    def execute(self, executions: Sequence[Execution], tokens: int) -> list[dict[str, float]]:
        """Save and measure checkpoints, in order."""
        return [self._engine.execute(execution, tokens) for execution in executions]
