"""The actor of a pool: one engine in one process."""

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
    """One engine in one process. Another worker may run the same call at the same time, with the same result."""

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, Examples]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(spec.threads)
        self._spec, self._tokens = spec, tokens

    def ready(self) -> str:
        """Return the name of the hardware."""
        if self._spec.device == "cuda" and torch.cuda.is_available():
            return torch.cuda.get_device_name()
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    def renew(self, spec: EngineSpec) -> None:
        """Use another engine from now on."""
        self._spec = spec
        vars(self).pop("_engine", None)

    @cached_property
    def _engine(self) -> Engine:
        # made by the first call and not by the constructor, because an actor that fails there counts as dead
        return Engine(self._spec, self._tokens)

    def build(self, builder: StoreBuilder, blocks: Sequence[int]) -> list[str]:
        """Prune some blocks on dense inputs, write their units, and return messages for the user."""
        messages: list[str] = []
        calibration = self._spec.calibration(self._tokens["calibration"], notify=messages.append)
        missing = builder.missing(self._spec.space)
        builder.fill(prune_on_dense_inputs(calibration, [block for block in blocks if block in missing]))
        return messages

    def solve(self, problem: UnitProblem) -> tuple[CompactLevels, list[str]]:
        """Solve a problem of the local pruner; return its levels with messages for the user."""
        assert self._spec.pruner is not None
        messages: list[str] = []
        return problem.solve(self._spec.pruner, messages.append), messages

    def measure(self, requests: Sequence[Request]) -> list[Outcome]:
        """See :meth:`Engine.measure_batch`."""
        return list(self._engine.measure_batch(requests))

    def expand(self, request: Request, index: int) -> ExpansionChunk:
        """See :meth:`Engine.expand`."""
        return self._engine.expand(request, index)

    def execute(self, execution: Execution, tokens: int) -> tuple[dict[str, float], list[str]]:
        """See :meth:`Engine.execute`; also return messages for the user. The checkpoint appears once it is measured."""
        messages: list[str] = []
        scratch = execution.out.parent / f"{socket.gethostname()}-{os.getpid()}" / execution.out.name
        shutil.rmtree(scratch, ignore_errors=True)
        figures = self._engine.execute(replace(execution, out=scratch), tokens, messages.append)
        try:
            scratch.rename(execution.out)
        except OSError:
            if not execution.out.exists():  # another worker was first, with the same bytes
                raise
        return figures, messages
