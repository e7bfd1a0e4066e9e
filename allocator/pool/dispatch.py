"""An evaluator that runs on a pool of Ray workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ray

from allocator.core.errors import UserError
from allocator.core.notify import Notify, Progress, silent
from allocator.core.protocols import Key, Outcome, Request
from allocator.evaluation.engine import combine_chunks
from allocator.evaluation.expansion import ExpansionChunk, num_chunks
from allocator.evaluation.spec import EngineSpec, Execution
from allocator.evaluation.training_states import TrainingStates
from allocator.model.data.examples import Examples
from allocator.pool.actor_pool import MAX_DEATHS, ActorPool
from allocator.pool.calls import ActorCall, WorkerLost
from allocator.pool.cluster import Demand
from allocator.pool.durations import PATIENCE_S
from allocator.pool.runs import cut_runs, estimate_size
from allocator.pool.worker import Worker
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import StoreBuilder
from allocator.pruning.pruners.protocol import UnitProblem

_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class _WorkItem:
    """Requests that one worker measures, or a chunk of an expansion.

    Attributes:
        requests: A run of requests; a single one for an expansion.
        chunk: Index of the chunk of an expansion; None for a run.
        deaths: Number of workers that died while they worked on this item.
        patience: The time after which the call is late is multiplied by this factor.
    """

    requests: tuple[Request, ...]
    chunk: int | None = None
    deaths: int = 0
    patience: float = 1.0

    def to_call(self, blocks: int) -> ActorCall:
        if self.chunk is not None:
            arguments = (self.requests[0], self.chunk)
            return ActorCall(method="expand", arguments=arguments, size=1.0, patience=self.patience)
        return ActorCall(
            method="measure",
            arguments=(self.requests,),
            size=estimate_size(self.requests, blocks),
            count=len(self.requests),
            patience=self.patience,
        )


class RayPool:
    """An evaluator on Ray workers. Outcomes depend neither on which worker measures them nor on the number of workers.

    A worker that dies is replaced, and its work is done again. A run of several requests is split into halves first. A
    request that kills its worker thus soon runs alone. If several workers in a row die while they measure one request
    alone, its outcome is a failure.
    """

    def __init__(
        self,
        spec: EngineSpec,
        tokens: Mapping[str, Examples],
        workers: int,
        notify: Notify = silent,
        demand: Demand | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Start workers on the cluster that this process is :func:`~allocator.pool.cluster.connected` to.

        Args:
            spec: The settings of their engines.
            tokens: The examples of each split; one copy per node.
            workers: The number of workers. If the cluster has too little room, the rest start when nodes join.
            notify: Called with messages for the user.
            demand: The resources of one worker; None for one CPU per thread.
            patience_s: No call is late before this time.
        """
        self._spec, self._notify = spec, notify
        self._actor = ray.remote(Worker).options(**(demand or Demand(spec.threads)).to_options())
        self._blocks = 1 + max(unit.block for unit in spec.space.units)
        self._lengths = {split: examples.length for split, examples in tokens.items()}
        self._spec_ref, self._tokens_ref = ray.put(spec), ray.put(dict(tokens))
        self._work: dict[int, _WorkItem] = {}
        self._open: set[Key] = set()
        self._chunks: dict[Key, dict[int, ExpansionChunk]] = {}
        self._actors = ActorPool(self._start_actor, workers, notify, patience_s)

    @property
    def alive(self) -> int:
        """Number of workers that can take a call."""
        return self._actors.alive

    def renew(self, spec: EngineSpec) -> None:
        """Make the workers use other engines, on the same tokens."""
        self._spec, self._spec_ref = spec, ray.put(spec)
        self._actors.renew(lambda actor: actor.renew.remote(self._spec_ref))

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Start to measure requests, and yield outcomes as workers finish.

        A second call may be made before the first iterator ends. Both batches are then measured at the same time. Each
        iterator may yield outcomes of both batches. It ends when all requests of its own batch are done.
        """
        plain = [request for request in requests if request.probe != "expansion"]
        self._open.update(request.key for request in requests)
        for request in requests:
            if request.probe == "expansion":
                self._chunks[request.key] = {}
                for index in range(num_chunks(request.tokens, self._lengths[request.split])):
                    self._send(_WorkItem((request,), index))
        for run in cut_runs(plain, self._actors.size):
            self._send(_WorkItem(tuple(run)))
        return self._iterate_outcomes(requests)

    def build(self, builder: StoreBuilder, blocks: Sequence[int], progress: Progress) -> None:
        """Prune blocks on dense inputs in parallel.

        Each worker prunes a contiguous share of the blocks, on all of the calibration text.
        """
        count = self._actors.size
        edges = [len(blocks) * index // count for index in range(count + 1)]
        shares = [blocks[start:end] for start, end in pairwise(edges) if start < end]
        space = self._spec.space

        def count_done() -> int:
            done = len({unit.block for unit in space.units}) - len(builder.missing(space))
            progress(done)
            return done

        calls = [ActorCall(method="build", arguments=(builder, share)) for share in shares]
        for _, messages in self._run(calls, count_done):
            for message in messages:
                self._notify(message)
            count_done()

    def solve(self, problems: Sequence[UnitProblem]) -> list[CompactLevels]:
        """Solve problems of the local pruner in parallel; return the results in order."""
        return self._run_in_order([ActorCall(method="solve", arguments=(problem,)) for problem in problems])

    def execute(self, executions: Sequence[Execution], tokens: int) -> list[dict[str, float]]:
        """Save and measure checkpoints in parallel; return the results in order."""
        calls = [ActorCall(method="execute", arguments=(execution, tokens)) for execution in executions]
        return self._run_in_order(calls)

    def close(self) -> None:
        """Stop the workers."""
        self._actors.close()

    def _start_actor(self) -> Any:
        return self._actor.remote(self._spec_ref, self._tokens_ref)

    def _send(self, item: _WorkItem) -> None:
        self._work[self._actors.add(item.to_call(self._blocks))] = item

    def _iterate_outcomes(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        keys = {request.key for request in requests}
        while not keys.isdisjoint(self._open):
            answer = self._actors.next()
            assert answer is not None, "there is no time limit"
            ticket, result = answer
            for outcome in self._collect_outcomes(self._work.pop(ticket), result):
                self._open.discard(outcome.request.key)
                yield outcome
        if self._spec.training is not None:
            TrainingStates(self._spec.training.folder).forget(requests)

    def _collect_outcomes(self, item: _WorkItem, result: Any) -> list[Outcome]:
        """Return the outcomes that a result completes; send the work of a lost worker again."""
        request = item.requests[0]
        if isinstance(result, WorkerLost):
            return self._retry(item, result)
        if item.chunk is None:
            return list(result)
        chunks = self._chunks[request.key]
        chunks[item.chunk] = result
        if len(chunks) < num_chunks(request.tokens, self._lengths[request.split]):
            return []
        del self._chunks[request.key]
        return [combine_chunks(request, self._spec.loss, [chunks[index] for index in sorted(chunks)])]

    def _retry(self, item: _WorkItem, lost: WorkerLost) -> list[Outcome]:
        """Send the work of a lost worker again; return a failure where too many workers were lost."""
        count = len(item.requests)
        if count > 1:
            self._notify("a worker died and is replaced; its requests are measured again in two halves")
            for half in (item.requests[: count // 2], item.requests[count // 2 :]):
                self._send(_WorkItem(half))
            return []
        if item.deaths + 1 < MAX_DEATHS:
            self._notify(
                f"a worker died and is replaced; its task is run again (failure {item.deaths + 1} of {MAX_DEATHS})"
            )
            self._send(_WorkItem(item.requests, item.chunk, item.deaths + 1, 4 * item.patience))
            return []
        self._chunks.pop(item.requests[0].key, None)
        for ticket, other in list(self._work.items()):  # the remaining chunks are useless
            if other.requests == item.requests:
                self._actors.drop(ticket)
                del self._work[ticket]
        reason = f"{MAX_DEATHS} workers died in a row while they measured only this allocation ({lost.reason})"
        self._notify(f"an allocation cannot be measured: {reason}")
        return [Outcome(request=item.requests[0], measured={}, wall_s=0.0, failed=reason)]

    def _run_in_order(self, calls: Sequence[ActorCall]) -> list[Any]:
        """Run calls that return a result with messages for the user; return the results in order."""
        done = dict(self._run(calls))
        for index in range(len(calls)):
            for message in done[index][1]:
                self._notify(message)
        return [done[index][0] for index in range(len(calls))]

    def _run(
        self, calls: Sequence[ActorCall], count_done: Callable[[], int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the results of calls with their indices, in any order.

        Meanwhile, ``count_done`` is called repeatedly. If its value grows, the pool takes this as progress.
        """
        pending = {self._actors.add(call): (index, call, 0) for index, call in enumerate(calls)}
        most_done = 0
        while pending:
            answer = self._actors.next(None if count_done is None else _POLL_S)
            if count_done is not None and (done := count_done()) > most_done:
                self._actors.touch()
                most_done = done
            if answer is None:
                continue
            index, call, deaths = pending.pop(answer[0])
            if not isinstance(answer[1], WorkerLost):
                yield index, answer[1]
                continue
            deaths += 1
            if deaths >= MAX_DEATHS:
                raise UserError(
                    f"workers: {MAX_DEATHS} workers died one after the other on the same task ({answer[1].reason}). "
                    "Free some memory or use fewer workers, then resume"
                )
            self._notify(f"a worker died and is replaced; its task is run again (failure {deaths} of {MAX_DEATHS})")
            pending[self._actors.add(call)] = (index, call, deaths)
        self._actors.drain()  # stop duplicates of finished calls, so that they do not write any more
