"""The loop that runs every searcher: ask, measure what the journal does not hold, record, tell."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from allocator.core.effort import Effort, Limit, Trained, candidate_tokens
from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.protocols import AllocationEvaluator, Fidelity, Key, Outcome, Probe, Request, Searcher
from allocator.core.space import Allocation

Listener = Callable[[Sequence[Outcome]], None]
"""Called with the outcomes of a batch."""

_SYNC_S = 1.0
"""Least time between syncs of the journal to the disk while other batches are under way; else every batch syncs."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are being measured.

    Attributes:
        requests: The requests, in the order of the answers.
        outcomes: The outcomes of those requests that are not in the journal, in the order in which they arrive.
    """

    requests: Sequence[Request]
    outcomes: Iterator[Outcome]


class Measurer:
    """Answers requests from the journal or by an evaluator, and counts their effort.

    If an allocation cannot be measured, its answer is twice the worst figures on the same text. So searchers need no
    special case. Code that chooses among allocations must leave out those in :attr:`failed`.

    Attributes:
        spent: Effort of all requests so far. Each is counted once, even if it was measured before a resume.
        failed: Allocations that could not be measured.
    """

    def __init__(self, evaluator: AllocationEvaluator, journal: Journal) -> None:
        self._evaluator, self._journal = evaluator, journal
        self._asked: set[Key] = set()
        self._numbers: dict[Key, int] = {}
        self._trained = Trained()
        self._batch = 0
        self._worst: dict[tuple[Fidelity, Probe], Outcome] = {}
        self._penalised: dict[Key, Outcome] = {}
        self.failed: set[Allocation] = set()
        self._under_way = 0
        self._start_s = self._synced_s = time.perf_counter()
        self.spent = Effort()

    def cost(self, requests: Sequence[Request]) -> Effort:
        """Return the effort that will be spent once a batch is measured."""
        new = list({r.key: r for r in requests if r.key not in self._asked}.values())
        return Effort(
            self.spent.evaluations + len(new),
            self.spent.tokens + sum(candidate_tokens(self._journal.space, new, self._trained)),
            (time.perf_counter() - self._start_s) / 60,
        )

    def measure(self, requests: Sequence[Request]) -> list[Outcome]:
        """Return one outcome per request, in order.

        Raises:
            UserError: More than half of the requests so far cannot be measured.
        """
        return self.finish(self.begin(requests))

    def begin(self, requests: Sequence[Request]) -> Batch:
        """Start measuring a batch. Batches are finished in the order in which they were begun."""
        self.spent = self.cost(requests)
        self._asked.update(request.key for request in requests)
        self._trained.note(requests)
        unknown = {r.key: r for r in requests if r.key not in self._numbers and self._journal.get(r) is None}
        self._numbers.update(dict.fromkeys(unknown, self._batch))
        self._batch += 1
        self._under_way += 1
        return Batch(requests, self._evaluator.evaluate(list(unknown.values())) if unknown else iter(()))

    def finish(self, batch: Batch) -> list[Outcome]:
        """Wait for a batch that was begun, and return its outcomes; see :meth:`measure`."""
        self._record(batch.outcomes)
        self._under_way -= 1
        now_s = time.perf_counter()
        if not self._under_way or now_s - self._synced_s >= _SYNC_S:
            self._journal.sync()
            self._synced_s = now_s
        answers = [self._journal.get(request) for request in batch.requests]
        measured = [answer for answer in answers if answer is not None]
        assert len(measured) == len(answers), "an evaluator answers every request"
        self.failed.update(o.request.allocation for o in measured if o.failed and not o.request.probe)
        for outcome in measured:
            self._compare(outcome)
        return [self._penalise(outcome) if outcome.failed else outcome for outcome in measured]

    def _record(self, outcomes: Iterable[Outcome]) -> None:
        failures = []
        for outcome in outcomes:
            if outcome.failed:
                failures.append(outcome)
            else:
                self._journal.append(outcome, self._numbers[outcome.request.key])
        count = len(self.failed) + len(failures)
        if failures and 2 * count > len(self._asked):  # these failures are not recorded, so a resume tries again
            raise UserError(
                f"evaluation: {count} of {len(self._asked)} allocations cannot be measured; of the last, "
                f"{failures[-1].failed}. Free some memory, use fewer workers or another dtype, then resume"
            )
        for failure in failures:
            self._journal.append(failure, self._numbers[failure.request.key])

    def _compare(self, outcome: Outcome) -> None:
        kind = (outcome.request.fidelity, outcome.request.probe)
        if not outcome.failed and (kind not in self._worst or outcome.loss > self._worst[kind].loss):
            self._worst[kind] = outcome

    def _penalise(self, failure: Outcome) -> Outcome:
        request = failure.request
        if request.key not in self._penalised:
            # a failed expansion gets an outcome without one: searchers then know that there are no gradients
            worst = self._worst.get((request.fidelity, "" if request.probe == "expansion" else request.probe))
            if worst is None or worst.loss <= 0:
                raise UserError(f"evaluation: nothing can be measured on {request.tokens} tokens: {failure.failed}")
            self._penalised[request.key] = replace(
                worst,
                request=request,
                measured={name: 2 * value for name, value in worst.measured.items()},
                sequence_losses=tuple(2 * part for part in worst.sequence_losses),
            )
        return self._penalised[request.key]

    def require_measured(self, allocations: Iterable[Allocation]) -> None:
        """Check that allocations could be measured. All others are compared with them.

        Raises:
            UserError: One of them could not be measured.
        """
        if self.failed.intersection(allocations):
            raise _undecidable("an allocation that all others are compared with cannot be measured")

    def drop_failed(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Return the outcomes of allocations that could be measured.

        Raises:
            UserError: No outcome is left.
        """
        measured = [outcome for outcome in outcomes if outcome.request.allocation not in self.failed]
        if not measured:
            raise _undecidable("none of the best allocations can be measured")
        return measured


def _undecidable(what: str) -> UserError:
    return UserError(
        f"evaluation: {what}: its workers die. "
        "Free some memory or use fewer workers, and begin again under another --name"
    )


def say_spent(limit: Limit) -> str:
    """Return why a search ended that has spent what it may spend."""
    return f"the budget of {limit} is spent"


def search(
    searcher: Searcher,
    measurer: Measurer,
    listen: Listener = lambda outcomes: None,
    limit: Limit | None = None,
    lag: int = 0,
) -> str:
    """Run a searcher to its end, or until its next batch would exceed what may be spent.

    Requests are first looked up in the journal. So a resumed search replays what was measured, and then continues.
    The searcher cannot tell the difference.

    Args:
        searcher: Proposes allocations and is told the outcomes.
        measurer: Answers requests.
        listen: Called with the outcomes of every batch.
        limit: What may be spent.
        lag: How many further batches are requested before the searcher is told the outcomes of the oldest batch. So
            what a searcher knows at each request never depends on the speed of workers.

    Returns:
        Why the search ended, in words.
    """
    spent_before = measurer.spent
    under_way: deque[Batch] = deque()
    ended = ""
    while True:
        while not ended and len(under_way) <= lag:
            requests = searcher.ask()
            if not requests:
                break
            if limit is not None and not limit.allows(measurer.cost(requests) - spent_before):
                ended = say_spent(limit)
            else:
                under_way.append(measurer.begin(requests))
        if not under_way:
            return ended or searcher.ended()
        outcomes = measurer.finish(under_way.popleft())
        searcher.tell(outcomes)
        listen(outcomes)
