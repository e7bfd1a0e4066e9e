"""Ray actors that pull calls: an actor that is done gets the next call.

Every call is answered once, even when the actors that run it fail. An actor whose node has not joined yet waits for it,
and gets calls afterwards. An actor that dies is replaced. A call that takes much longer than its peers is given to a
second actor too, and the first answer counts. An actor that hangs is replaced. Time is that of a monotonic clock.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from allocator.core.errors import UserError
from allocator.core.notify import Notify
from allocator.pool.calls import ActorCall, WorkerLost
from allocator.pool.durations import PATIENCE_S, Durations

MAX_DEATHS = 3
"""Number of workers in a row that die of one call, or before any call, until the call or the cluster is at fault."""

LOST = 3.0
"""A worker is replaced after this multiple of the time that makes its call late, if no other worker has the call."""

GONE = 10.0
"""A worker is replaced after this multiple of the time that another took for the same call."""

_RETRY_S = 60.0
"""Pause before the next start of a worker, where some cannot be started and others work."""

_SILENCE_S = 120.0


@dataclass(slots=True, eq=False, kw_only=True)
class _Member:
    """An actor and what it works on.

    Attributes:
        actor: The handle of the actor.
        opening: The reference that is ready once the actor can take calls; None afterwards.
        renewing: Whether the actor opens after a renewal.
        renewed_s: When the renewal began; None for an actor that was still waiting for its node.
        ticket: The number of the call that it runs.
        result: The reference to the result of that call.
        since_s: When the call began.
        late_s: The duration after which the call is late.
        lived: Whether the actor has ever been open.
        warm: The methods that it has run.
    """

    actor: Any
    opening: Any = None
    renewing: bool = False
    renewed_s: float | None = None
    ticket: int | None = None
    result: Any = None
    since_s: float = 0.0
    late_s: float = 0.0
    lived: bool = False
    warm: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Job:
    """A call without an answer.

    Attributes:
        call: The call.
        members: Number of members that run it.
        duplicated: Whether it was queued for a second member.
    """

    call: ActorCall
    members: int = 0
    duplicated: bool = False


class ActorPool:
    """Ray actors that pull calls. Each has a method ``ready()``, which returns the name of its hardware."""

    def __init__(
        self, start_actor: Callable[[], Any], size: int, notify: Notify, patience_s: float = PATIENCE_S
    ) -> None:
        """Start ``size`` actors; ``notify`` is called with messages for the user."""
        self._start_actor, self._notify, self._patience_s = start_actor, notify, patience_s
        self._members: list[_Member] = []
        self._waited_for: dict[Any, _Member] = {}
        self._jobs: dict[int, _Job] = {}
        self._waiting: deque[int] = deque()
        self._answers: deque[tuple[int, Any]] = deque()
        self._tickets = 0
        self._durations = Durations(patience_s)
        self._hardware: set[str] = set()
        self._failed_starts = self._missing = 0
        self._start_at_s = 0.0
        self._moved_s = self._checked_s = self._answered_s = time.monotonic()
        for _ in range(size):
            self._add_member()

    @property
    def size(self) -> int:
        """Number of members, including those that wait for their node."""
        return len(self._members) + self._missing

    @property
    def alive(self) -> int:
        """Number of members that can take calls."""
        return sum(member.opening is None for member in self._members)

    @property
    def actors(self) -> list[Any]:
        """The actors of all members."""
        return [member.actor for member in self._members]

    def add(self, call: ActorCall) -> int:
        """Queue a call after those that were added before; return the ticket under which it is answered."""
        self._tickets += 1
        self._jobs[self._tickets] = _Job(call)
        self._waiting.append(self._tickets)
        self._assign()
        return self._tickets

    def next(self, timeout_s: float | None = None) -> tuple[int, Any] | None:
        """Return the ticket of a call and its result, or :class:`WorkerLost`; None where nothing is done in time.

        Raises:
            UserError: A call raised it, or no worker can be started.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._answers:
            assert self._jobs, "there is no call to wait for"
            self._assign()
            pause_s = min(1.0, self._patience_s / 10)
            pause_s = pause_s if end_s is None else max(0.0, min(pause_s, end_s - time.monotonic()))
            done, others = ray.wait(list(self._waited_for), timeout=pause_s, fetch_local=False)
            if done and others:
                done += ray.wait(others, num_returns=len(others), timeout=0, fetch_local=False)[0]
            for ref in done:
                self._receive(ref)
            if done:
                self.touch()
            self._check()
            if end_s is not None and not self._answers and time.monotonic() >= end_s:
                return None
        return self._answers.popleft()

    def touch(self) -> None:
        """Note that work proceeds; the user is notified when nothing does for long."""
        self._moved_s = time.monotonic()

    def drop(self, ticket: int) -> None:
        """Drop a call: it is not answered, even if a member runs it."""
        self._jobs.pop(ticket, None)

    def drain(self) -> None:
        """Replace members that still run a call that was answered by another member, or dropped."""
        for member in list(self._members):
            if member.ticket is not None and member.ticket not in self._jobs:
                self._replace(member)

    def renew(self, call: Callable[[Any], Any]) -> None:
        """Make every actor run something before its next call; replace those that fail. No call may be running."""
        assert not self._jobs, "calls are running"
        self.drain()
        self._durations = Durations(self._patience_s)
        for member in self._members:
            self._waited_for.pop(member.opening, None)
            member.renewing = True
            # a member that waits for a node has no time limit
            member.renewed_s = time.monotonic() if member.opening is None else None
            member.warm.clear()
            self._open(member, call(member.actor))

    def close(self) -> None:
        """Stop the actors."""
        for member in self._members:
            _kill(member.actor)
        self._members = []
        self._waited_for.clear()

    def _add_member(self) -> None:
        actor = self._start_actor()
        self._members.append(_Member(actor=actor))
        self._open(self._members[-1], actor.ready.remote())

    def _open(self, member: _Member, opening: Any) -> None:
        member.opening = opening
        self._waited_for[opening] = member

    def _replace(self, member: _Member) -> None:
        self._remove(member)
        self._add_member()

    def _remove(self, member: _Member) -> None:
        for ref in (member.opening, member.result):
            self._waited_for.pop(ref, None)
        self._members.remove(member)
        _kill(member.actor)

    def _assign(self) -> None:
        idle = (member for member in self._members if member.opening is None and member.result is None)
        while self._waiting:
            if self._waiting[0] not in self._jobs:
                self._waiting.popleft()  # queued for a second member, and the first has answered
            elif (member := next(idle, None)) is not None:
                self._assign_to(self._waiting.popleft(), member)
            else:
                return

    def _assign_to(self, ticket: int, member: _Member) -> None:
        job = self._jobs[ticket]
        job.members += 1
        member.ticket, member.since_s = ticket, time.monotonic()
        member.result = getattr(member.actor, job.call.method).remote(*job.call.arguments)
        self._waited_for[member.result] = member

    def _receive(self, ref: Any) -> None:
        """Receive the answer of a member."""
        member = self._waited_for.pop(ref, None)
        if member is None:
            return  # replaced while other answers were received
        opening, ticket = ref == member.opening, member.ticket
        result = None
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if opening and member.renewing:
                self._replace(member)  # a new actor may succeed; if not, its error tells why
                return
            if opening or ticket in self._jobs:
                # Ray's own error is an OSError as well, but has no errno
                raise error.cause if isinstance(error.cause, (UserError, OSError)) else error from None
        except RayError as error:
            if opening:
                self._handle_failed_start(member, error)
            else:
                self._handle_loss(member, type(error).__name__)
            return
        if opening:
            self._handle_opened(member, result)
            return
        assert ticket is not None
        member.result = member.ticket = None
        if (job := self._jobs.pop(ticket, None)) is not None:
            duration_s = time.monotonic() - member.since_s
            self._durations.record(job.call, job.call.method in member.warm, duration_s)
            member.warm.add(job.call.method)
            for other in self._members:
                if other.ticket == ticket:
                    other.late_s = max(self._patience_s, duration_s)
            self._answered_s = time.monotonic()
            self._answers.append((ticket, result))

    def _handle_opened(self, member: _Member, hardware: str | None) -> None:
        member.opening = member.renewed_s = None
        member.lived, member.renewing = True, False
        self._failed_starts = 0
        if hardware is not None and hardware not in self._hardware:
            self._hardware.add(hardware)
            if len(self._hardware) > 1:
                kinds = " and ".join(sorted(self._hardware))
                self._notify(f"notice: workers run on {kinds}; the plan may differ by rounding")

    def _handle_failed_start(self, member: _Member, error: Exception) -> None:
        """Replace a member that did not open; pause after many failures, and stop where no other member works."""
        self._failed_starts += not member.lived
        if self._failed_starts < MAX_DEATHS + len(self._members):
            self._replace(member)
        elif any(other.lived and other is not member for other in self._members):
            self._remove(member)
            self._missing += 1
            self._start_at_s = time.monotonic() + _RETRY_S
            count = f"{len(self._members)} of {self.size} are there"
            self._notify(f"a worker cannot be started, and is tried again; {count}")
        else:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"workers: none can be started ({reason[0]}). See the cluster's logs, then resume"
            ) from None

    def _handle_loss(self, member: _Member, reason: str) -> None:
        """Replace a member that is lost. Answer its call with :class:`WorkerLost`, unless another member runs it."""
        ticket = member.ticket
        self._replace(member)
        for other in self._members:  # others may have died too: check them before a call is charged with their death
            if other.opening is None and other.result is None:
                self._open(other, other.actor.ready.remote())
        if ticket is None or (job := self._jobs.get(ticket)) is None:
            return
        job.members -= 1
        if job.members == 0:
            del self._jobs[ticket]
            self._answers.append((ticket, WorkerLost(reason)))

    def _check(self) -> None:
        """Give late calls to a second member, replace members that hang, and notify the user of a long silence."""
        now_s = time.monotonic()
        if now_s - self._checked_s < self._patience_s / 10:
            return
        self._checked_s = now_s
        if self._missing and now_s >= self._start_at_s:
            self._missing -= 1
            self._add_member()
        for member in list(self._members):
            if member.renewed_s is not None and now_s - member.renewed_s > LOST * self._patience_s:
                self._replace(member)
            elif member.ticket is not None:
                self._check_duration(member, now_s - member.since_s)
        if now_s - self._moved_s > _SILENCE_S:
            self.touch()
            free = ray.available_resources().get("CPU", 0)
            self._notify(
                f"no worker has finished a task for {_SILENCE_S:.0f} s; {self.alive} of {self.size} workers are there, "
                f"and {free:.0f} CPUs of the cluster are free"
            )

    def _check_duration(self, member: _Member, duration_s: float) -> None:
        """Duplicate the call of a member that is late; replace a member that hangs."""
        assert member.ticket is not None
        job = self._jobs.get(member.ticket)
        if job is None:  # another member has answered it; late_s is the time that it took
            lost = duration_s > GONE * member.late_s
        else:
            usual_s, member.late_s = self._durations.estimate(job.call, job.call.method in member.warm)
            # where no member proceeds, the call is not at fault; a call of unknown size may just be long
            moving = self._answered_s > member.since_s or len(self._members) == 1
            known = job.call.size is not None and usual_s is not None
            lost = job.members == 1 and known and moving and duration_s > LOST * member.late_s
            if not lost and duration_s > member.late_s and not job.duplicated:
                job.duplicated = True
                self._waiting.appendleft(member.ticket) if known else self._waiting.append(member.ticket)
        if lost:
            self._notify("a worker hangs, and is replaced")
            self._handle_loss(member, "it hung")


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor)
