"""A crew of Ray actors that pull tasks: whoever is done gets the next one.

Every task is answered once, whatever happens to those that work on it. Members whose node is not there yet wait for it,
and get tasks when it has joined; those that die are replaced. What takes much longer than its peers took is given to a
second member too, and the first answer counts; whoever does not come back at all is replaced. Time is that of a
monotonic clock.
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
from allocator.pool.durations import PATIENCE_S, Task, Usual

MAX_DEATHS = 3
"""Workers that may die one after the other, of one task or before any task, until that is taken for its fault."""

LOST = 3.0
"""A worker is given up once it has taken so many times what makes its task late, and nobody else could take that."""

GONE = 10.0
"""A worker is given up once it has taken so many times what another took for the same task."""

_AGAIN_S = 60.0
"""Where some workers cannot be started and others work, the next are tried after so long."""

_SILENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Died:
    """In place of a result: the worker was lost.

    Attributes:
        reason: Why, without addresses.
    """

    reason: str


@dataclass(slots=True, eq=False)
class _Member:
    """An actor; ``opening`` is what it answers once it can take tasks, ``call`` what it works on."""

    actor: Any
    opening: Any = None
    renewing: bool = False
    renewed_s: float | None = None
    ticket: int | None = None
    call: Any = None
    since_s: float = 0.0
    late_s: float = 0.0
    lived: bool = False
    warm: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Job:
    """A task that is not answered, how many members work on it, and whether a second one was asked for."""

    task: Task
    members: int = 0
    again: bool = False


class ActorPool:
    """Ray actors that pull tasks. Each has ``ready()``, which says what hardware it is on."""

    def __init__(self, hire: Callable[[], Any], size: int, notify: Notify, patience_s: float = PATIENCE_S) -> None:
        """Hire ``size`` actors; ``notify`` hears what a user should know."""
        self._hire, self._notify, self._patience_s = hire, notify, patience_s
        self._members: list[_Member] = []
        self._waited_for: dict[Any, _Member] = {}
        self._jobs: dict[int, _Job] = {}
        self._waiting: deque[int] = deque()
        self._answers: deque[tuple[int, Any]] = deque()
        self._tickets = 0
        self._usual = Usual(patience_s)
        self._hardware: set[str] = set()
        self._stillborn = self._owed = 0
        self._hire_at_s = 0.0
        self._moved_s = self._looked_s = self._landed_s = time.monotonic()
        for _ in range(size):
            self._add_member()

    @property
    def size(self) -> int:
        """Members, those included that wait for their node."""
        return len(self._members) + self._owed

    @property
    def alive(self) -> int:
        """Members that can take tasks."""
        return sum(member.opening is None for member in self._members)

    @property
    def actors(self) -> list[Any]:
        """The actors of all members."""
        return [member.actor for member in self._members]

    def add(self, task: Task) -> int:
        """Have a task done after those that were added before; return the number under which it is answered."""
        self._tickets += 1
        self._jobs[self._tickets] = _Job(task)
        self._waiting.append(self._tickets)
        self._assign()
        return self._tickets

    def next(self, timeout_s: float | None = None) -> tuple[int, Any] | None:
        """Return the number of a task and its result, or :class:`Died`; None where nothing is done in time.

        Raises:
            UserError: What a task raised, or no worker can be started.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._answers:
            assert self._jobs, "somebody waits for tasks that were not given"
            self._assign()
            pause_s = min(1.0, self._patience_s / 10)
            pause_s = pause_s if end_s is None else max(0.0, min(pause_s, end_s - time.monotonic()))
            done, others = ray.wait(list(self._waited_for), timeout=pause_s, fetch_local=False)
            if done and others:
                done += ray.wait(others, num_returns=len(others), timeout=0, fetch_local=False)[0]
            for ref in done:
                self._land(ref)
            if done:
                self.stir()
            self._look()
            if end_s is not None and not self._answers and time.monotonic() >= end_s:
                return None
        return self._answers.popleft()

    def stir(self) -> None:
        """Take note that something moves, for there is word when nothing does for long."""
        self._moved_s = time.monotonic()

    def drop(self, ticket: int) -> None:
        """Have a task not answered, whether somebody works on it or not."""
        self._jobs.pop(ticket, None)

    def settle(self) -> None:
        """Replace members that still work on what was answered by others, or dropped: nobody does when this returns."""
        for member in list(self._members):
            if member.ticket is not None and member.ticket not in self._jobs:
                self._replace(member)

    def renew(self, call: Callable[[Any], Any]) -> None:
        """Have every actor do something before its next task; who does not is replaced. No task may be under way."""
        assert not self._jobs, "tasks are under way"
        self.settle()
        self._usual = Usual(self._patience_s)
        for member in self._members:
            self._waited_for.pop(member.opening, None)
            member.renewing = True
            # whoever waits for a node may take its time
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
        actor = self._hire()
        self._members.append(_Member(actor))
        self._open(self._members[-1], actor.ready.remote())

    def _open(self, member: _Member, opening: Any) -> None:
        member.opening = opening
        self._waited_for[opening] = member

    def _replace(self, member: _Member) -> None:
        self._forget(member)
        self._add_member()

    def _forget(self, member: _Member) -> None:
        for ref in (member.opening, member.call):
            self._waited_for.pop(ref, None)
        self._members.remove(member)
        _kill(member.actor)

    def _assign(self) -> None:
        idle = (member for member in self._members if member.opening is None and member.call is None)
        while self._waiting:
            if self._waiting[0] not in self._jobs:
                self._waiting.popleft()  # a second one was asked for, and the first has answered
            elif (member := next(idle, None)) is not None:
                self._give(self._waiting.popleft(), member)
            else:
                return

    def _give(self, ticket: int, member: _Member) -> None:
        job = self._jobs[ticket]
        job.members += 1
        member.ticket, member.since_s = ticket, time.monotonic()
        member.call = getattr(member.actor, job.task.method).remote(*job.task.arguments)
        self._waited_for[member.call] = member

    def _land(self, ref: Any) -> None:
        """Take what a member answers."""
        member = self._waited_for.pop(ref, None)
        if member is None:
            return  # given up while others landed
        opening, ticket = ref == member.opening, member.ticket
        result = None
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if opening and member.renewing:
                self._replace(member)  # a fresh one may do, and else tells why not
                return
            if opening or ticket in self._jobs:
                # Ray's own is an OSError as well, but does not know its number
                raise error.cause if isinstance(error.cause, (UserError, OSError)) else error from None
        except RayError as error:
            if opening:
                self._unopened(member, error)
            else:
                self._dead(member, type(error).__name__)
            return
        if opening:
            self._opened(member, result)
            return
        assert ticket is not None
        member.call = member.ticket = None
        if (job := self._jobs.pop(ticket, None)) is not None:
            took_s = time.monotonic() - member.since_s
            self._usual.note(job.task, job.task.method in member.warm, took_s)
            member.warm.add(job.task.method)
            for other in self._members:
                if other.ticket == ticket:
                    other.late_s = max(self._patience_s, took_s)
            self._landed_s = time.monotonic()
            self._answers.append((ticket, result))

    def _opened(self, member: _Member, hardware: str | None) -> None:
        member.opening = member.renewed_s = None
        member.lived, member.renewing = True, False
        self._stillborn = 0
        if hardware is not None and hardware not in self._hardware:
            self._hardware.add(hardware)
            if len(self._hardware) > 1:
                kinds = " and ".join(sorted(self._hardware))
                self._notify(f"notice: workers run on {kinds}; the plan may differ by rounding")

    def _unopened(self, member: _Member, error: Exception) -> None:
        """Replace a member that did not open; pause where that goes on, and stop where nobody else works."""
        self._stillborn += not member.lived
        if self._stillborn < MAX_DEATHS + len(self._members):
            self._replace(member)
        elif any(other.lived and other is not member for other in self._members):
            self._forget(member)
            self._owed += 1
            self._hire_at_s = time.monotonic() + _AGAIN_S
            there = f"{len(self._members)} of {self.size} are there"
            self._notify(f"a worker cannot be started, and is tried again; {there}")
        else:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"workers: none can be started ({reason[0]}). See the cluster's logs, then resume"
            ) from None

    def _dead(self, member: _Member, reason: str) -> None:
        """Replace a member that is lost, and say so of its task unless another still works on it."""
        ticket = member.ticket
        self._replace(member)
        for other in self._members:  # others may have gone with it, and what they are given next shall not pay for that
            if other.opening is None and other.call is None:
                self._open(other, other.actor.ready.remote())
        if ticket is None or (job := self._jobs.get(ticket)) is None:
            return
        job.members -= 1
        if job.members == 0:
            del self._jobs[ticket]
            self._answers.append((ticket, Died(reason)))

    def _look(self) -> None:
        """Have late tasks done by a second member too, give up members that do not come back, and break silences."""
        now_s = time.monotonic()
        if now_s - self._looked_s < self._patience_s / 10:
            return
        self._looked_s = now_s
        if self._owed and now_s >= self._hire_at_s:
            self._owed -= 1
            self._add_member()
        for member in list(self._members):
            if member.renewed_s is not None and now_s - member.renewed_s > LOST * self._patience_s:
                self._replace(member)
            elif member.ticket is not None:
                self._look_at(member, now_s - member.since_s)
        if now_s - self._moved_s > _SILENCE_S:
            self.stir()
            free = ray.available_resources().get("CPU", 0)
            self._notify(
                f"no worker has finished a task for {_SILENCE_S:.0f} s; {self.alive} of {self.size} workers are there, "
                f"and {free:.0f} CPUs of the cluster are free"
            )

    def _look_at(self, member: _Member, took_s: float) -> None:
        """Judge a member that is at a task for so long."""
        assert member.ticket is not None
        job = self._jobs.get(member.ticket)
        if job is None:  # another has done it, in the time that stands for late here
            lost = took_s > GONE * member.late_s
        else:
            usual_s, member.late_s = self._usual.judge(job.task, job.task.method in member.warm)
            # where nobody gets on, it is not the task; and where size tells nothing, it may just be long
            moving = self._landed_s > member.since_s or len(self._members) == 1
            known = job.task.size is not None and usual_s is not None
            lost = job.members == 1 and known and moving and took_s > LOST * member.late_s
            if not lost and took_s > member.late_s and not job.again:
                job.again = True
                self._waiting.appendleft(member.ticket) if known else self._waiting.append(member.ticket)
        if lost:
            self._notify("a worker hangs, and is replaced")
            self._dead(member, "it hung")


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor)
