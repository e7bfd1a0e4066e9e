"""What an actor of the pool does: one engine in one process, and the local pruner on what it is sent."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from allocator.core.protocols import Outcome, Request
from allocator.evaluation.engine import Engine
from allocator.evaluation.expansion import ExpansionChunk
from allocator.evaluation.spec import EngineSpec, Execution
from allocator.model.data.examples import Examples
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import StoreBuilder
from allocator.pruning.pruners.protocol import UnitProblem


class Worker:
    """One engine in one process. Every call may be made again, by another worker at once, and comes to the same."""

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, Examples]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(spec.threads)
        self._spec, self._tokens = spec, tokens

    def ready(self) -> str:
        """Return what hardware this is."""
        if self._spec.device == "cuda" and torch.cuda.is_available():
            return torch.cuda.get_device_name()
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    def renew(self, spec: EngineSpec) -> None:
        """Go on with another engine."""
        self._spec = spec
        vars(self).pop("_engine", None)

    @cached_property
    def _engine(self) -> Engine:
        # made by the first task and not by the constructor, for an actor that fails in there counts as dead
        return Engine(self._spec, self._tokens)

    def build(self, builder: StoreBuilder, blocks: Sequence[int]) -> list[str]:
        """Prune some blocks on dense inputs, write their units, and return what a user should know."""
        said: list[str] = []
        calibration = self._spec.calibration(self._tokens["calibration"], notify=said.append)
        missing = builder.missing(self._spec.space)
        builder.fill(prune_on_dense_inputs(calibration, [block for block in blocks if block in missing]))
        return said

    def solve(self, problem: UnitProblem) -> tuple[CompactLevels, list[str]]:
        """Solve a problem of the local pruner, and return what a user should know."""
        assert self._spec.pruner is not None
        said: list[str] = []
        return problem.solve(self._spec.pruner, said.append), said

    def measure(self, requests: Sequence[Request]) -> list[Outcome]:
        """See :meth:`Engine.measure_batch`."""
        return list(self._engine.measure_batch(requests))

    def expand(self, request: Request, index: int) -> ExpansionChunk:
        """See :meth:`Engine.expand`."""
        return self._engine.expand(request, index)

    def execute(self, execution: Execution, tokens: int) -> tuple[dict[str, float], list[str]]:
        """See :meth:`Engine.execute`; with what a user should know. The checkpoint appears when it is measured."""
        said: list[str] = []
        own = execution.out.parent / f"{socket.gethostname()}-{os.getpid()}" / execution.out.name
        shutil.rmtree(own, ignore_errors=True)
        figures = self._engine.execute(replace(execution, out=own), tokens, said.append)
        try:
            own.rename(execution.out)
        except OSError:
            if not execution.out.exists():  # another worker was first, with the same bytes
                raise
        return figures, said
