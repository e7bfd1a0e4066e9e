"""An evaluator in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from allocator.core.notify import Notify, Progress, silent
from allocator.core.protocols import Outcome, Request
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec, Execution
from allocator.evaluation.training_states import TrainingStates
from allocator.model.data.examples import Examples
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import StoreBuilder
from allocator.pruning.pruners.protocol import UnitProblem


class LocalEvaluator:
    """Prunes, measures and saves allocations in this process; see :class:`~allocator.evaluation.spec.Evaluator`."""

    alive = 0

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, Examples], notify: Notify = silent) -> None:
        """Keep what an engine is made from; the engine itself is made when it is first used.

        Args:
            spec: What the engine is made from.
            tokens: Examples of each split.
            notify: Called with a message for the user.
        """
        self._spec, self._tokens, self._notify = spec, tokens, notify

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self._spec, self._tokens)

    def renew(self, spec: EngineSpec) -> None:
        """Continue with an engine made from another specification, on the same tokens."""
        self._spec = spec
        vars(self).pop("_engine", None)

    def build(self, builder: StoreBuilder, blocks: Sequence[int], progress: Progress) -> None:
        """Prune blocks on dense inputs, and write their units to a store."""
        calibration = self._spec.calibration(self._tokens["calibration"], progress, self._notify)
        builder.fill(prune_on_dense_inputs(calibration, blocks))

    def solve(self, problems: Sequence[UnitProblem]) -> list[CompactLevels]:
        """Return the compact levels of problems, in order."""
        assert self._spec.pruner is not None
        return [problem.solve(self._spec.pruner, self._notify) for problem in problems]

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes as they are measured."""
        yield from self._engine.measure_batch(requests)
        if self._spec.training is not None:
            TrainingStates(self._spec.training.folder).forget(requests)

    def execute(self, executions: Sequence[Execution], tokens: int) -> list[dict[str, float]]:
        """Save and measure checkpoints, in order."""
        return [self._engine.execute(execution, tokens, self._notify) for execution in executions]

    def close(self) -> None:
        """Release the engine and its model."""
        vars(self).pop("_engine", None)
