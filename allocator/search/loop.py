"""The loop that every searcher runs under: ask, measure what is not known, record, tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from allocator.core.journal import Journal
from allocator.core.protocols import Evaluator, Outcome, Request, Searcher

Listener = Callable[[Sequence[Outcome]], None]


def measure(requests: Sequence[Request], evaluator: Evaluator, journal: Journal) -> list[Outcome]:
    """Answer requests from the journal, and measure and record those that it does not know."""
    unknown = {request.key: request for request in requests if journal.get(request) is None}
    if unknown:
        try:
            for outcome in evaluator.evaluate(list(unknown.values())):
                journal.append(outcome)
        finally:
            journal.sync()
    answers = [journal.get(request) for request in requests]
    assert all(answer is not None for answer in answers), "an evaluator answers every request"
    return [answer for answer in answers if answer is not None]


def search(
    searcher: Searcher, evaluator: Evaluator, journal: Journal, listen: Listener = lambda outcomes: None
) -> None:
    """Run a searcher to its end.

    A journal that already holds outcomes answers first, so a resumed search replays what was measured and
    continues from there: the searcher cannot tell the difference.
    """
    while requests := searcher.ask():
        outcomes = measure(requests, evaluator, journal)
        searcher.tell(outcomes)
        listen(outcomes)
