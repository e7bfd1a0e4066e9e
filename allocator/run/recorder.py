"""``status.json``: the progress of a run, written to its folder for other processes to read."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from allocator.core.errors import UserError
from allocator.core.files import write_json
from allocator.run.reporting import Reporter

if TYPE_CHECKING:  # code that reads the status of a run imports no model code
    from allocator.evaluation.spec import Evaluator

NAME = "status.json"
SCHEMA = 1

BEAT_S = 10.0
"""The longest time between two writes, in seconds. The age of the file shows whether the run is alive."""

_THROTTLE_S = 1.0
_RECENT_S = 60.0
_PLACES = re.compile(r"\w+://\S+|\b\d{1,3}(\.\d{1,3}){3}(:\d+)?\b")


class Recorder:
    """A reporter that writes progress to a file and passes it on to another reporter.

    Use it as a context manager around a whole run. It writes nothing before :meth:`start_recording`. A failure to
    write does not disturb the run.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._path: Path | None = None
        self._workers: Callable[[], int] = lambda: 0
        self._status: dict[str, Any] = {"phase": "", "done": 0, "total": None}
        self._points: deque[tuple[float, int, int]] = deque(maxlen=256)
        self._written_s = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._status["state"] = "stopped"
        elif error is not None:
            self._status["state"] = "failed"
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._status["error"] = _PLACES.sub("<address>", said)[:2000]
        else:
            self._status["state"] = "finished"
        self._write()

    def start_recording(self, folder: Path, evaluations: int) -> None:
        """Write ``status.json`` in a run's folder from now on. The journal already has this number of evaluations."""
        self._path = folder / NAME
        self._status = {"state": "running", "begun": _now(), **self._status, "evaluations": evaluations}
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def attach(self, evaluator: Evaluator | None) -> None:
        """Report the number of workers of this evaluator from now on. For None, report no workers."""
        self._workers = lambda: 0 if evaluator is None else evaluator.alive

    def record_results(self, evaluations: int, members: int, figures: Mapping[str, float]) -> None:
        """Record the results so far. Call this method before :meth:`advance`.

        Args:
            evaluations: Number of measured allocations.
            members: Number of members of the front.
            figures: Figures by name that show how good the front is.
        """
        with self._lock:
            if evaluations < self._status["evaluations"]:
                self._points.clear()  # a new round has begun, with a new journal
            self._status.update(evaluations=evaluations, front=members, reached=dict(figures))

    def start_phase(self, name: str, total: int | None = None) -> None:
        """See :class:`~allocator.run.reporting.Reporter`."""
        with self._lock:
            self._status.update(phase=name, done=0, total=total)
            self._points.clear()
            self._note()
        self._write()
        self._reporter.start_phase(name, total)

    def advance(self, done: int, note: str = "") -> None:
        """See :class:`~allocator.run.reporting.Reporter`."""
        with self._lock:
            self._status["done"] = done
            self._note()
        if time.monotonic() - self._written_s >= _THROTTLE_S:
            self._write()
        self._reporter.advance(done, note)

    def notify(self, message: str) -> None:
        """See :class:`~allocator.run.reporting.Reporter`."""
        self._reporter.notify(message)

    def _note(self) -> None:
        now = time.monotonic()
        self._points.append((now, self._status["done"], self._status.get("evaluations", 0)))
        while len(self._points) > 2 and self._points[1][0] < now - _RECENT_S:
            self._points.popleft()

    def _pace(self) -> dict[str, float]:
        """Return the speed over the last minute, and the time left in the phase."""
        pace: dict[str, float] = {}
        if not self._points or self._points[0][0] == self._points[-1][0]:
            return pace
        (start, first, known), (end, done, measured) = self._points[0], self._points[-1]
        total = self._status["total"]
        if measured > known:
            pace["evaluations_per_s"] = round((measured - known) / (end - start), 3)
        if total is not None and done > first:
            pace["phase_left_s"] = round(max(0.0, (total - done) * (end - start) / (done - first)), 1)
        return pace

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            if time.monotonic() - self._written_s >= BEAT_S:
                self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        with self._lock, contextlib.suppress(OSError):
            running = self._status["state"] == "running"
            pace = {**self._pace(), "workers": self._workers()} if running else {}
            head = {"schema": SCHEMA, "kind": "allocator.status"}
            self._written_s = time.monotonic()
            write_json(self._path, {**head, **self._status, **pace, "machine": machine(), "updated": _now()})


def machine() -> str:
    """Return a hash that identifies this machine until its next start. It does not reveal the machine's name."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return "unknown"
    return hashlib.sha256(booted).hexdigest()[:12]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
