"""What a crew is asked for, what that usually takes, and from when on it is late."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

LATE = 2.0
"""A task is late once it has taken so many times what is usual more than is usual.

What is the sum of n things varies less: there it is so many times over the root of n.
"""

LONG = 6.0
"""A task whose size tells nothing, or that is the first of its kind, is not late before so many times the patience."""

PATIENCE_S = 10.0
"""No task is late before."""

_PEERS = 64


@dataclass(frozen=True, slots=True)
class Task:
    """A call of a method of an actor that may be made twice, on two actors at once, and answers the same.

    Attributes:
        method: Its name.
        arguments: Its arguments.
        size: What tasks of one method take in proportion to each other; None where that is not known.
        count: Of how many things what it takes is the sum.
        patience: Factor on the time after which it is late.
    """

    method: str
    arguments: tuple[Any, ...]
    size: float | None = None
    count: int = 1
    patience: float = 1.0


class Usual:
    """What tasks took so far: the median of the last of a method, per size.

    The first of a method that somebody does is cold: it has to load things, and is noted apart, and whole.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._took: dict[tuple[str, bool], deque[float]] = {}

    def note(self, task: Task, warm: bool, took_s: float) -> None:
        """Take note of what a task took."""
        took = self._took.setdefault((task.method, warm), deque(maxlen=_PEERS))
        took.append(took_s / (task.size or 1.0) if warm else took_s)

    def judge(self, task: Task, warm: bool) -> tuple[float | None, float]:
        """Return what a task should take, None while no other of its kind is done, and after which time it is late."""
        usual_s = self._usual_s(task, warm)
        patience_s = self._patience_s * (LONG if usual_s is None or task.size is None else 1.0)
        return usual_s, max(patience_s, (usual_s or 0.0) * (1 + LATE / task.count**0.5)) * task.patience

    def _usual_s(self, task: Task, warm: bool) -> float | None:
        took, cold = (self._took.get((task.method, each)) for each in (True, False))
        warm_s = statistics.median(took) * (task.size or 1.0) if took else None
        if warm:
            return warm_s
        return None if cold is None else statistics.median(cold) + (warm_s or 0.0)
