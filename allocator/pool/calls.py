"""A call of an actor, and the mark that stands in place of its result when the worker was lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorCall:
    """A call of an actor's method that may run twice, on two actors at once, with the same result.

    Attributes:
        method: The name of the method.
        arguments: Its arguments.
        size: Expected duration in proportion to other calls of the method; None where it is not known.
        count: Number of things whose durations add up to the duration of the call.
        patience: Factor on the time after which the call is late.
    """

    method: str
    arguments: tuple[Any, ...]
    size: float | None = None
    count: int = 1
    patience: float = 1.0


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Stands in place of a result when the worker was lost.

    Attributes:
        reason: Why, without addresses.
    """

    reason: str
