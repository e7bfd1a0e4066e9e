"""Searches from their start to their end, and evaluators that fail or answer out of order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import AllocationEvaluator, Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.loop import Measurer, search


class Recording:
    """A searcher that keeps what it asked and was told.

    Attributes:
        batches: The requests of every batch.
        told: The outcomes of every batch.
    """

    def __init__(self, searcher: Searcher) -> None:
        """Wrap a searcher that has not begun."""
        self._searcher = searcher
        self.batches: list[list[Request]] = []
        self.told: list[list[Outcome]] = []

    def ask(self) -> Sequence[Request]:
        """Return the next batch of the searcher."""
        requests = self._searcher.ask()
        if requests:
            self.batches.append(list(requests))
        return requests

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Pass outcomes on to the searcher."""
        self.told.append(list(outcomes))
        self._searcher.tell(outcomes)

    def ended(self) -> str:
        """Return why the searcher ended."""
        return self._searcher.ended()

    def finalists(self) -> Sequence[Allocation]:
        """Return the finalists of the searcher."""
        return self._searcher.finalists()

    @property
    def known(self) -> list[Outcome]:
        """Each outcome once, in the order in which they were told."""
        return list({outcome.request.key: outcome for batch in self.told for outcome in batch}.values())


def run_search(
    searcher: Searcher, space: SearchSpace, evaluator: AllocationEvaluator, folder: Path, known: Iterable[Outcome] = ()
) -> Recording:
    """Run a searcher to its end, and return its record.

    Args:
        searcher: A searcher that has not begun.
        space: Its space.
        evaluator: Measures what is not known.
        folder: Where a new journal is written.
        known: What is in the journal before, as after a resume.
    """
    record = Recording(searcher)
    path = folder / f"journal{len(list(folder.iterdir()))}.jsonl"
    with Journal.create(path, JournalHeader(space=space)) as journal:
        for outcome in known:
            journal.append(outcome)
        search(record, Measurer(evaluator, journal))
    return record


class Refusing:
    """An evaluator that is never asked, because everything is known."""

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Fail."""
        raise AssertionError(f"asked to measure {requests}")


class Shuffled:
    """An evaluator that answers in any order, as workers do."""

    def __init__(self, evaluator: AllocationEvaluator, seed: int) -> None:
        """Wrap an evaluator; the order is a function of the seed."""
        self._evaluator, self._rng = evaluator, np.random.default_rng(seed)

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield all outcomes, out of order."""
        outcomes = list(self._evaluator.evaluate(requests))
        yield from (outcomes[index] for index in self._rng.permutation(len(outcomes)))


class Failing:
    """An evaluator that cannot measure one allocation in five.

    Attributes:
        failed: What it could not measure.
    """

    def __init__(self, evaluator: AllocationEvaluator, start: Allocation) -> None:
        """Wrap an evaluator; ``start`` can be measured."""
        self._evaluator, self._seen = evaluator, {start}
        self.failed: set[Allocation] = set()

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes and failures."""
        for request in requests:
            allocation = request.allocation
            if allocation not in self._seen:
                self._seen.add(allocation)
                if len(self._seen) % 5 == 3:
                    self.failed.add(allocation)
            if allocation in self.failed:
                yield Outcome(request=request, measured={}, wall_s=0.0, failed="3 workers died")
            else:
                yield from self._evaluator.evaluate([request])
