"""A pool of Ray workers as an evaluator: what to send, how to cut it, and what to make of workers that die of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import ray

from allocator.core.errors import UserError
from allocator.core.notify import Notify, Progress
from allocator.core.protocols import Key, Outcome, Request
from allocator.evaluation.engine import combine_chunks
from allocator.evaluation.expansion import ExpansionChunk, num_chunks
from allocator.evaluation.spec import EngineSpec, Execution
from allocator.evaluation.training_states import TrainingStates
from allocator.model.data.examples import Examples
from allocator.pool.actor_pool import MAX_DEATHS, ActorPool, Died
from allocator.pool.cluster import Demand
from allocator.pool.durations import PATIENCE_S, Task
from allocator.pool.worker import Worker
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import StoreBuilder
from allocator.pruning.pruners.protocol import UnitProblem

_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class _Sent:
    """Requests that a worker measures, or a chunk of an expansion, and the workers that died of it alone."""

    requests: tuple[Request, ...]
    chunk: int | None = None
    deaths: int = 0
    patience: float = 1.0

    def task(self, blocks: int) -> Task:
        if self.chunk is None:
            size = _size(self.requests, blocks)
            return Task("measure", (self.requests,), size, len(self.requests), self.patience)
        return Task("expand", (self.requests[0], self.chunk), 1.0, patience=self.patience)


class RayPool:
    """Evaluates on Ray workers. Outcomes do not depend on which worker measured them, nor on how many there are.

    A worker that dies is replaced, and what it had is done again: a run of requests in halves, so that one which kills
    its worker is soon alone. Is it alone when another worker dies, and another, its outcome is a failure.
    """

    def __init__(
        self,
        spec: EngineSpec,
        tokens: Mapping[str, Examples],
        workers: int,
        notify: Notify = lambda message: None,
        demand: Demand | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Start workers on the cluster that this process is :func:`~allocator.pool.cluster.connected` to.

        Args:
            spec: What their engines are made from.
            tokens: Examples of each split; one copy for each node.
            workers: How many, at most: those that find no room wait for nodes that join.
            notify: Hears what a user should know.
            demand: What each takes of its node; None for a CPU for every thread.
            patience_s: No task counts as late before.
        """
        self._spec, self._notify = spec, notify
        self._actor = ray.remote(Worker).options(**(demand or Demand(spec.threads)).options())
        self._blocks = 1 + max(unit.block for unit in spec.space.units)
        self._lengths = {split: examples.length for split, examples in tokens.items()}
        self._spec_ref, self._tokens_ref = ray.put(spec), ray.put(dict(tokens))
        self._sent: dict[int, _Sent] = {}
        self._open: set[Key] = set()
        self._chunks: dict[Key, dict[int, ExpansionChunk]] = {}
        self._crew = ActorPool(self._hire, workers, notify, patience_s)

    @property
    def alive(self) -> int:
        """Workers that can take a task."""
        return self._crew.alive

    def renew(self, spec: EngineSpec) -> None:
        """Go on with other engines, in the same workers and on the same tokens."""
        self._spec, self._spec_ref = spec, ray.put(spec)
        self._crew.renew(lambda actor: actor.renew.remote(self._spec_ref))

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Have requests measured, and yield outcomes as workers finish runs of neighbours and chunks of expansions.

        What is asked for before all of it is yielded is measured at the same time. An iterator yields what of either
        is done, and ends when nothing of its own is left.
        """
        plain = [request for request in requests if request.probe != "expansion"]
        self._open.update(request.key for request in requests)
        for request in requests:
            if request.probe == "expansion":
                self._chunks[request.key] = {}
                for index in range(num_chunks(request.tokens, self._lengths[request.split])):
                    self._send(_Sent((request,), index))
        for run in _runs(plain, self._crew.size):
            self._send(_Sent(tuple(run)))
        return self._outcomes(requests)

    def build(self, builder: StoreBuilder, blocks: Sequence[int], progress: Progress) -> None:
        """Prune blocks on dense inputs side by side: each worker reads the text through, and prunes a run of blocks."""
        count = self._crew.size
        edges = [len(blocks) * index // count for index in range(count + 1)]
        shares = [blocks[start:end] for start, end in pairwise(edges) if start < end]
        space = self._spec.space

        def look() -> int:
            done = len({unit.block for unit in space.units}) - len(builder.missing(space))
            progress(done)
            return done

        for _, said in self._run([Task("build", (builder, share)) for share in shares], look):
            for message in said:
                self._notify(message)
            look()

    def solve(self, problems: Sequence[UnitProblem]) -> list[CompactLevels]:
        """Solve problems of the local pruner side by side; results in order."""
        return self._in_order([Task("solve", (problem,)) for problem in problems])

    def execute(self, executions: Sequence[Execution], tokens: int) -> list[dict[str, float]]:
        """Save and measure checkpoints side by side; results in order."""
        return self._in_order([Task("execute", (execution, tokens)) for execution in executions])

    def close(self) -> None:
        """Stop the workers."""
        self._crew.close()

    def _hire(self) -> Any:
        return self._actor.remote(self._spec_ref, self._tokens_ref)

    def _send(self, sent: _Sent) -> None:
        self._sent[self._crew.add(sent.task(self._blocks))] = sent

    def _outcomes(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        own = {request.key for request in requests}
        while not own.isdisjoint(self._open):
            answer = self._crew.next()
            assert answer is not None, "without a time limit something comes"
            sent = self._sent.pop(answer[0])
            for outcome in self._taken(sent, answer[1]):
                self._open.discard(outcome.request.key)
                yield outcome
        if self._spec.training is not None:
            TrainingStates(self._spec.training.folder).forget(requests)

    def _taken(self, sent: _Sent, answer: Any) -> list[Outcome]:
        """Return the outcomes that are known with an answer; send again what a worker died of."""
        request = sent.requests[0]
        if isinstance(answer, Died):
            return self._again(sent, answer)
        if sent.chunk is None:
            return list(answer)
        chunks = self._chunks[request.key]
        chunks[sent.chunk] = answer
        if len(chunks) < num_chunks(request.tokens, self._lengths[request.split]):
            return []
        del self._chunks[request.key]
        return [combine_chunks(request, self._spec.loss, [chunks[index] for index in sorted(chunks)])]

    def _again(self, sent: _Sent, died: Died) -> list[Outcome]:
        count = len(sent.requests)
        if count > 1:
            self._notify("a worker died and is replaced; what it measured is measured again, in halves")
            for half in (sent.requests[: count // 2], sent.requests[count // 2 :]):
                self._send(_Sent(half))
            return []
        if sent.deaths + 1 < MAX_DEATHS:
            self._notify(
                f"a worker died and is replaced; its task is run again ({sent.deaths + 1} of {MAX_DEATHS} times)"
            )
            self._send(_Sent(sent.requests, sent.chunk, sent.deaths + 1, 4 * sent.patience))
            return []
        self._chunks.pop(sent.requests[0].key, None)
        for ticket, other in list(self._sent.items()):  # chunks that are of no more use
            if other.requests == sent.requests:
                self._crew.drop(ticket)
                del self._sent[ticket]
        reason = f"{MAX_DEATHS} workers died one after the other while they measured it alone ({died.reason})"
        self._notify(f"an allocation cannot be measured: {reason}")
        return [Outcome(sent.requests[0], {}, 0.0, failed=reason)]

    def _in_order(self, tasks: Sequence[Task]) -> list[Any]:
        """Return the results of tasks that also return what a user should know."""
        done = dict(self._run(tasks))
        for index in range(len(tasks)):
            for message in done[index][1]:
                self._notify(message)
        return [done[index][0] for index in range(len(tasks))]

    def _run(self, tasks: Sequence[Task], look: Callable[[], int] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield the results of tasks with their indices, as they come.

        Meanwhile ``look`` is called now and then; it returns a number that grows while there is no reason to worry.
        """
        sent = {self._crew.add(task): (index, task, 0) for index, task in enumerate(tasks)}
        seen = 0
        while sent:
            answer = self._crew.next(None if look is None else _LOOK_S)
            if look is not None and (now := look()) > seen:
                self._crew.stir()
                seen = now
            if answer is None:
                continue
            index, task, deaths = sent.pop(answer[0])
            if not isinstance(answer[1], Died):
                yield index, answer[1]
                continue
            deaths += 1
            if deaths >= MAX_DEATHS:
                raise UserError(
                    f"workers: {MAX_DEATHS} workers died one after the other on the same task ({answer[1].reason}). "
                    "Free some memory or use fewer workers, then resume"
                )
            self._notify(f"a worker died and is replaced; its task is run again ({deaths} of {MAX_DEATHS} times)")
            sent[self._crew.add(task)] = (index, task, deaths)
        self._crew.settle()  # what was run twice shall not write any more


def _size(run: Sequence[Request], blocks: int) -> float:
    """Return about what a run takes, in tokens through all of a model's blocks.

    Units at the front that are as in the allocation before take nothing. It is a guess that costs little; what an
    allocation is charged with is :func:`~allocator.core.effort.candidate_tokens`.
    """
    levels_nu = np.array([request.allocation for request in run])
    shared_n = [0.0, *np.cumprod(levels_nu[1:] == levels_nu[:-1], axis=1).mean(axis=1).tolist()]
    parts = (max((r.blocks or blocks) / blocks - share, 0.0) for r, share in zip(run, shared_n, strict=True))
    return sum(r.tokens * part + 4 * r.training for r, part in zip(run, parts, strict=True)) + 1.0


def _runs(requests: Sequence[Request], workers: int) -> list[list[Request]]:
    """Cut requests, in an order that puts those side by side that share work, into runs of falling length.

    Half of them in a run for each worker, half of the rest likewise, and so on (factoring: Hummel, Schonberg and Flynn,
    CACM 1992): long runs share most, and short ones at the end leave no worker idle while another is at a long one.
    """
    ordered = sorted(requests, key=lambda r: (r.split, r.tokens, r.probe, r.allocation, r.blocks))
    runs: list[list[Request]] = []
    start = 0
    while start < len(ordered):
        length = -(-(len(ordered) - start) // (2 * workers))
        for _ in range(workers):
            if start < len(ordered):
                runs.append(ordered[start : start + length])
                start += length
    return runs
