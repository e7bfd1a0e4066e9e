"""Searchers written as generators: they yield batches of requests and are sent the outcomes.

A search of several phases reads in the order in which it runs, and phases compose with ``yield from``. A generator's
only state is what it was sent, so if it is run again and sent the same outcomes, it asks for the same measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation

Script = Generator[Sequence[Request], Sequence[Outcome], str]
"""A whole search. It yields batches of requests, is sent their outcomes in order, and returns why it ended."""

Steps = Generator[Sequence[Request], Sequence[Outcome], None]
"""A part of a script."""

Measuring = Generator[Sequence[Request], Sequence[Outcome], list[Outcome]]
"""A part of a script that returns outcomes."""


class GeneratorSearcher:
    """A script behind the :class:`~allocator.core.protocols.Searcher` protocol."""

    def __init__(self, script: Script, rank: Callable[[], Sequence[Allocation]]) -> None:
        """Run the script up to its first request; ``rank`` returns the best allocations so far, best first."""
        self._script, self._rank, self._end = script, rank, ""
        self._requests: Sequence[Request] = []
        self._advance(lambda: next(script))

    def ask(self) -> Sequence[Request]:
        """Return the script's next batch."""
        return self._requests

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Send the outcomes to the script."""
        self._advance(lambda: self._script.send(outcomes))

    def ended(self) -> str:
        """Return why the script ended."""
        return self._end

    def finalists(self) -> Sequence[Allocation]:
        """Return the best allocations so far, best first."""
        return self._rank()

    def _advance(self, resume: Callable[[], Sequence[Request]]) -> None:
        try:
            self._requests = resume()
        except StopIteration as stop:
            self._requests, self._end = [], stop.value
