"""A pool of Ray actors, each with an engine. Work is pulled: a worker that is done gets the next task."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from allocator.core.errors import UserError
from allocator.core.protocols import Key, Outcome, Request
from allocator.evaluate.engine import Engine, EngineSpec, Execution, expanded
from allocator.evaluate.expansion import Portion, num_portions
from allocator.evaluate.states import States
from allocator.prune.assemble import CompactLevels
from allocator.prune.build import prune_on_dense_inputs
from allocator.prune.problem import Problem, Progress
from allocator.prune.store import StoreBuilder

MAX_DEATHS = 3
"""Workers that one task may cost, each time on a fresh worker, before the run stops."""

RUNS_PER_WORKER = 2
"""Runs into which a batch is cut: the fewer, the more work its allocations share; one leaves workers idle."""

_KNOCK_S = 10.0
_SILENCE_S = 120.0
_LOOK_S = 1.0

Notify = Callable[[str], None]


class Worker:
    """One engine in one process."""

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, np.ndarray]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(spec.threads)
        self._spec, self._tokens = spec, tokens

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
        calibration = self._spec.calibration(self._tokens["calibration"], report=said.append)
        missing = builder.missing(self._spec.space)
        builder.fill(prune_on_dense_inputs(calibration, [block for block in blocks if block in missing]))
        return said

    def solve(self, problem: Problem) -> tuple[CompactLevels, list[str]]:
        """Solve a problem of the local pruner, and return what a user should know."""
        assert self._spec.pruner is not None
        said: list[str] = []
        return problem.solve(self._spec.pruner, said.append), said

    def measure(self, requests: Sequence[Request]) -> list[Outcome]:
        """See :meth:`Engine.measure_batch`."""
        return list(self._engine.measure_batch(requests))

    def expand(self, request: Request, index: int) -> Portion:
        """See :meth:`Engine.expand`."""
        return self._engine.expand(request, index)

    def execute(self, execution: Execution, tokens: int) -> tuple[dict[str, float], list[str]]:
        """See :meth:`Engine.execute`; with what a user should know."""
        said: list[str] = []
        return self._engine.execute(execution, tokens, said.append), said


class RayPool:
    """Evaluates on Ray workers.

    A worker that dies is replaced and its task is run again; a task that kills worker after worker stops the
    run. Outcomes do not depend on which worker measured them, nor on how many there are.
    """

    def __init__(
        self,
        spec: EngineSpec,
        tokens: Mapping[str, np.ndarray],
        workers: int,
        notify: Notify = lambda message: None,
    ) -> None:
        """Start ``workers`` actors on the cluster that this process is :func:`connected` to."""
        self._spec, self._notify = spec, notify
        self._lengths = {split: ids.shape[1] for split, ids in tokens.items()}
        self._spec_ref, self._tokens_ref = ray.put(spec), ray.put(dict(tokens))
        self._workers = [self._start() for _ in range(workers)]
        self._renewing: dict[Any, Any] = {}

    def renew(self, spec: EngineSpec) -> None:
        """Go on with other engines, in the same workers and on the same tokens."""
        self._spec, self._spec_ref = spec, ray.put(spec)
        self._renewing = {worker.renew.remote(self._spec_ref): worker for worker in self._workers}

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes as workers finish runs of neighbouring allocations, and all portions of expansions."""
        parts = [(r, index) for r in requests if r.also == "expansion" for index in range(self._num_portions(r))]
        runs = _runs([r for r in requests if r.also != "expansion"], RUNS_PER_WORKER * len(self._workers))
        portions: dict[Key, dict[int, Portion]] = {request.key: {} for request, _ in parts}
        for place, found in self._run([*(("expand", part) for part in parts), *(("measure", (run,)) for run in runs)]):
            if place >= len(parts):
                yield from found
                continue
            request, index = parts[place]
            own = portions[request.key]
            own[index] = found
            if len(own) == self._num_portions(request):
                yield expanded(request, self._spec.loss, [own[index] for index in sorted(own)])
        if self._spec.training is not None:
            States(self._spec.training.folder).forget(requests)

    def build(self, builder: StoreBuilder, blocks: Sequence[int], progress: Progress) -> None:
        """Prune blocks on dense inputs side by side: each worker reads the text through, and prunes a run of blocks."""
        edges = [len(blocks) * index // len(self._workers) for index in range(len(self._workers) + 1)]
        shares = [blocks[start:end] for start, end in pairwise(edges) if start < end]
        space = self._spec.space

        def look() -> int:
            done = len({unit.block for unit in space.units}) - len(builder.missing(space))
            progress(done)
            return done

        for _, said in self._run([("build", (builder, share)) for share in shares], look):
            for message in said:
                self._notify(message)
            look()

    def solve(self, problems: Sequence[Problem]) -> list[CompactLevels]:
        """Solve problems of the local pruner side by side; results in order."""
        return self._in_order([("solve", (problem,)) for problem in problems])

    def execute(self, executions: Sequence[Execution], tokens: int) -> list[dict[str, float]]:
        """Save and measure checkpoints side by side; results in order."""
        return self._in_order([("execute", (execution, tokens)) for execution in executions])

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            with contextlib.suppress(RayActorError):
                ray.kill(worker)
        self._workers = []

    def _num_portions(self, request: Request) -> int:
        return num_portions(request.tokens, self._lengths[request.split])

    def _start(self) -> Any:
        gpus = 1 if self._spec.device == "cuda" else 0
        actor = ray.remote(num_cpus=self._spec.threads, num_gpus=gpus)(Worker)
        return actor.remote(self._spec_ref, self._tokens_ref)

    def _in_order(self, tasks: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """Return the results of tasks that also return what a user should know."""
        done = dict(self._run(tasks))
        for index in range(len(tasks)):
            for message in done[index][1]:
                self._notify(message)
        return [done[index][0] for index in range(len(tasks))]

    def _run(
        self, tasks: Sequence[tuple[str, tuple[Any, ...]]], look: Callable[[], int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the results of tasks with their indices, as they come.

        Meanwhile ``look`` is called now and then; it returns a number that grows while there is no reason to worry.
        """
        waiting = list(range(len(tasks)))[::-1]
        idle = [worker for worker in self._workers if worker not in self._renewing.values()]
        deaths = [0] * len(tasks)
        flying: dict[Any, tuple[Any, int]] = {}
        while waiting or flying:
            while waiting and idle:
                worker, index = idle.pop(), waiting.pop()
                method, arguments = tasks[index]
                flying[getattr(worker, method).remote(*arguments)] = (worker, index)
            done: list[Any] = []
            silent_s, seen = 0.0, 0
            while not done and silent_s < _SILENCE_S:
                pause_s = _SILENCE_S if look is None else _LOOK_S
                done, _ = ray.wait([*flying, *self._renewing], num_returns=1, timeout=pause_s)
                silent_s += pause_s
                if look is not None and (now := look()) > seen:
                    silent_s, seen = 0.0, now
            if not done:
                free = ray.available_resources().get("CPU", 0)
                self._notify(
                    f"no worker has finished a task for {_SILENCE_S:.0f} s; {free:.0f} CPUs of the cluster are free"
                )
                continue
            if done[0] in self._renewing:
                idle.append(self._renewed(done[0]))
                continue
            worker, index = flying.pop(done[0])
            try:
                result = ray.get(done[0])
            except RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, UserError) else error from None
            except RayError as error:
                deaths[index] += 1
                if deaths[index] >= MAX_DEATHS:
                    raise UserError(
                        f"workers: {MAX_DEATHS} workers died one after the other on the same task ({error}). "
                        "Free some memory or use fewer workers, then resume"
                    ) from None
                self._notify(f"a worker died and is replaced; its task is run again ({deaths[index]} of {MAX_DEATHS})")
                replacement = self._start()
                self._workers[self._workers.index(worker)] = replacement
                idle.append(replacement)
                waiting.append(index)
                continue
            idle.append(worker)
            yield index, result

    def _renewed(self, ref: Any) -> Any:
        """Return a worker whose renewal is over, or another in its place if that failed."""
        worker = self._renewing.pop(ref)
        try:
            ray.get(ref)
        except RayError:
            with contextlib.suppress(RayActorError):
                ray.kill(worker)
            replacement = self._start()
            self._workers[self._workers.index(worker)] = replacement
            return replacement
        return worker


def _runs(requests: Sequence[Request], count: int) -> list[list[Request]]:
    """Cut requests, in an order that puts those side by side that share work, into runs of nearly equal length."""
    ordered = sorted(requests, key=lambda r: (r.split, r.tokens, r.also, r.allocation, r.blocks))
    edges = [len(ordered) * index // count for index in range(count + 1)]
    return [ordered[start:end] for start, end in pairwise(edges) if start < end]


@contextlib.contextmanager
def connected(cpus: int, address: str | None, gpus: int = 0) -> Iterator[None]:
    """Hold a connection to a Ray cluster with room for ``cpus`` single-threaded workers, on ``gpus`` GPUs.

    A session that is open already is used, and stays open. Else a connection is made to ``address``, to the
    cluster of the environment, or to a local cluster that lives as long as the connection.

    Raises:
        UserError: No cluster answers at ``address``, or it has fewer CPUs or GPUs.
    """
    owned = not ray.is_initialized()
    if owned:
        _connect(cpus, address or os.environ.get("RAY_ADDRESS"))
    try:
        for kind, needed in (("CPU", cpus), ("GPU", gpus)):
            there = int(ray.cluster_resources().get(kind, 0))
            if there < needed:
                raise UserError(
                    f"workers: they need {needed} {kind}s, and the Ray cluster has {there}. Use fewer --workers"
                )
        yield
    finally:
        if owned:
            ray.shutdown()


def _connect(cpus: int, address: str | None) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None and "RAY_JOB_ID" not in os.environ:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        return
    try:
        if address is not None:
            _knock(address)
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"address: no Ray cluster answers at {address} ({reason}). Start one with 'ray start --head', "
            "or leave --address out for a local one"
        ) from None


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port: Ray itself would try for minutes, and write about it."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
