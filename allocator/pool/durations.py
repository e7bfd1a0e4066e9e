"""How long calls take, and after which time a call is late."""

from __future__ import annotations

import statistics
from collections import deque

from allocator.pool.calls import ActorCall

LATE = 2.0
"""A call is late once it exceeds its usual duration by this multiple of that duration.

A sum of n durations varies less: there the multiple is divided by the root of n.
"""

LONG = 6.0
"""Multiple of the patience before which a call of unknown size, or the first of its kind, is never late."""

PATIENCE_S = 10.0
"""No call is late before this time."""

_HISTORY = 64


class Durations:
    """The durations of the last calls of each method, and their median per size.

    The first call of a method on a worker is cold, because the worker must load things. Cold durations are recorded
    apart, and not divided by size.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._durations: dict[tuple[str, bool], deque[float]] = {}

    def record(self, call: ActorCall, warm: bool, duration_s: float) -> None:
        """Record the duration of a call."""
        history = self._durations.setdefault((call.method, warm), deque(maxlen=_HISTORY))
        history.append(duration_s / (call.size or 1.0) if warm else duration_s)

    def estimate(self, call: ActorCall, warm: bool) -> tuple[float | None, float]:
        """Return the expected duration of a call, and the duration after which it is late.

        The expected duration is None until another call of its kind is done.
        """
        usual_s = self._usual_s(call, warm)
        patience_s = self._patience_s * (LONG if usual_s is None or call.size is None else 1.0)
        return usual_s, max(patience_s, (usual_s or 0.0) * (1 + LATE / call.count**0.5)) * call.patience

    def _usual_s(self, call: ActorCall, warm: bool) -> float | None:
        warm_history, cold_history = (self._durations.get((call.method, is_warm)) for is_warm in (True, False))
        warm_s = statistics.median(warm_history) * (call.size or 1.0) if warm_history else None
        if warm:
            return warm_s
        return None if cold_history is None else statistics.median(cold_history) + (warm_s or 0.0)
