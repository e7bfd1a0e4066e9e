"""Live progress on the terminal: one bar per phase, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """Receives the progress of long work."""

    def start_phase(self, name: str, total: int | None = None) -> None:
        """Start a phase of ``total`` steps. None if the number is not known."""
        ...

    def advance(self, done: int, note: str = "") -> None:
        """Report that ``done`` steps of the phase are done."""
        ...

    def notify(self, message: str) -> None:
        """Show a message on a line of its own."""
        ...


class Silent:
    """Ignores all progress."""

    def start_phase(self, name: str, total: int | None = None) -> None:
        """Ignore."""

    def advance(self, done: int, note: str = "") -> None:
        """Ignore."""

    def notify(self, message: str) -> None:
        """Ignore."""


class Live:
    """Progress on standard error. Use as a context manager."""

    _QUIET_S = 10.0

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID | None = None
        self._name, self._printed_s = "", 0.0
        self._total: int | None = None

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._progress.stop()

    def start_phase(self, name: str, total: int | None = None) -> None:
        """Finish the last bar and start one."""
        self._finish()
        self._name, self._total, self._printed_s = name, total, time.monotonic()
        self._task = self._progress.add_task(name, total=total, note="")
        if not self._console.is_terminal:
            self._console.print(f"{name} ...")

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar; without a terminal, a line every ten seconds."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
        if not self._console.is_terminal and time.monotonic() - self._printed_s >= self._QUIET_S:
            self._printed_s = time.monotonic()
            of, comma = f" of {self._total}" if self._total else "", ", " if note else ""
            self._console.print(f"{self._name}: {done}{of}{comma}{note}")

    def notify(self, message: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(message, soft_wrap=True, markup=False)

    def _finish(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[self._task].total or 1
            self._progress.update(self._task, total=total, completed=total)
        self._task = None
