"""How long work speaks: callbacks for messages and for progress, and the ones that do nothing."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Called with a message for the user."""

Progress = Callable[[int], None]
"""Called with the number of steps that are done."""


def silent(message: str) -> None:
    """Ignore a message."""


def ignore_progress(done: int) -> None:
    """Ignore progress."""
