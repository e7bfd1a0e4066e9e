"""Searchers written as scripts: generators that yield requests and are sent their outcomes.

A search of several phases reads as it runs, and phases compose with ``yield from``. A script's only state is what it
was sent, so that one that is run again and sent the same outcomes asks the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np

from allocator.core.budget import Budget
from allocator.core.protocols import Key, Outcome, Request
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.solvers.knapsack import knapsack_nearby
from allocator.searchers.solvers.space_arrays import Ladders
from allocator.searchers.surrogates.quadratic import Quadratic
from allocator.searchers.surrogates.surrogate import Difference, Surrogate
from allocator.searchers.surrogates.tabular import Tabular

Script = Generator[Sequence[Request], Sequence[Outcome], str]
"""Yields batches of requests, is sent their outcomes in order, and returns why it ended."""

Steps = Generator[Sequence[Request], Sequence[Outcome], None]
"""A part of a script."""

Measuring = Generator[Sequence[Request], Sequence[Outcome], list[Outcome]]
"""A part of a script that returns outcomes."""


class Memory:
    """What a script has measured, and the model of it.

    Attributes:
        space: The search space.
        budget: What every allocation keeps to.
        ladders: The space as arrays.
        tokens: Fidelities, increasing; the last is that of finalists.
        expanding: Tokens of expansions around the centre, the last fidelity unless another is given.
        centre: Where the search is: the best allocation at the last fidelity.
        gradients: Whether the evaluator has any, as far as is known.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget,
        start: Sequence[Allocation],
        tokens: Sequence[int],
        expanding: int | None = None,
    ) -> None:
        self.space, self.budget, self.tokens, self.expanding = space, budget, tuple(tokens), expanding or tokens[-1]
        self.ladders = Ladders(space, budget)
        self.centre = start[0]
        self.gradients = True
        self._model: Tabular | Quadratic = Tabular(self.ladders, self.centre, self.tokens[-1])
        self._fitted = True
        self._known: dict[Key, Outcome] = {}
        self._filling: list[tuple[float, Allocation]] = []

    def measure(self, allocations: Iterable[Allocation], tokens: int) -> Measuring:
        """Ask for what is not known, and return the outcomes of all, in order."""
        wanted = [Request(allocation, tokens) for allocation in dict.fromkeys(allocations)]
        if unknown := [request for request in wanted if request.key not in self._known]:
            for outcome in (yield unknown):
                self._known[outcome.request.key] = outcome
                allocation = outcome.request.allocation
                if tokens == self.tokens[-1] and self.ladders.filled(allocation):
                    self._filling.append((outcome.loss, allocation))
        return [self._known[request.key] for request in wanted]

    def begin(self, start: Sequence[Allocation]) -> Steps:
        """Measure allocations at the last fidelity, and make the best of them the centre."""
        yield from self.measure(start, self.tokens[-1])
        self.advance()

    def move(self, budget: Budget) -> Steps:
        """Go on within another budget, from the best that is known there, and what the model thinks best."""
        table_ul = self.surrogate.table_ul
        self.budget, self.ladders = budget, Ladders(self.space, budget)
        full = [
            outcome
            for outcome in self._known.values()
            if outcome.request == Request(outcome.request.allocation, self.tokens[-1])
        ]
        self._filling = [
            (outcome.loss, outcome.request.allocation)
            for outcome in full
            if self.ladders.filled(outcome.request.allocation)
        ]
        settled = self.ladders.settle(self.centre, table_ul)
        yield from self.measure([settled, self._drawn(self.ladders, table_ul)], self.tokens[-1])
        self.advance()

    def drawn(self, budget: Budget) -> Allocation:
        """Return what the model thinks best within another budget."""
        return self._drawn(Ladders(self.space, budget), self.surrogate.table_ul)

    def _drawn(self, ladders: Ladders, table_ul: np.ndarray) -> Allocation:
        settled = ladders.settle(self.centre, table_ul)
        return knapsack_nearby(ladders, table_ul, settled, max(self.space.sparsest))

    def compare(
        self, allocations: Sequence[Allocation], tokens: int
    ) -> Generator[Sequence[Request], Sequence[Outcome], list[Difference]]:
        """Measure allocations and the centre on the same text, and let the model see the differences."""
        first, *others = yield from self.measure([self.centre, *allocations], tokens)
        found = [difference(other, first) for other in others]
        for one in found:
            self._model.observe(one)
        self._fitted = False
        return found

    def expand(self, few: int | None = None) -> Steps:
        """Learn how the loss begins to change around the centre, if the evaluator has gradients.

        From then on the model is quadratic. A curvature that was not measured on ``few`` tokens (those of the first
        fidelity) takes one step of its unit, and an expansion on the same tokens.
        """
        yield from self._expand(self.expanding)
        if not isinstance(self._model, Quadratic):
            return
        few = few or self.tokens[0]
        if len(units := self._model.unbent(few)):
            yield from self._expand(few)
            yield from self.compare([self._step(int(unit)) for unit in units], few)

    def _expand(self, tokens: int) -> Steps:
        request = Request(self.centre, tokens, probe="expansion")
        if not self.gradients:
            return
        if (outcome := self._known.get(request.key)) is None:
            (outcome,) = yield [request]
            self._known[request.key] = outcome
        elif tokens < self.expanding or (isinstance(self._model, Quadratic) and self._model.around == self.centre):
            return
        self.gradients = outcome.expansion is not None
        if self.gradients:
            if not isinstance(self._model, Quadratic):
                self._model = Quadratic(self.ladders, self.expanding)
            self._model.expand(outcome)
            self._fitted = False

    def _step(self, unit: int) -> Allocation:
        """Return the centre with a unit one level sparser, or denser where there is none."""
        level = self.centre[unit]
        other = level + 1 if level < self.ladders.last_u[unit] else level - 1
        return (*self.centre[:unit], other, *self.centre[unit + 1 :])

    def knows(self, allocation: Allocation, tokens: int) -> bool:
        """Whether an allocation was measured at a fidelity."""
        return Request(allocation, tokens).key in self._known

    def seen(self, allocation: Allocation) -> bool:
        """Whether an allocation was measured at any fidelity."""
        return any(self.knows(allocation, tokens) for tokens in self.tokens)

    @property
    def surrogate(self) -> Surrogate:
        """The model, fitted to all that was measured, around the centre."""
        if not self._fitted:
            self._model.refresh(self.centre)
            self._fitted = True
        return self._model

    @property
    def loss(self) -> float:
        """The loss of the centre at the last fidelity."""
        return self._known[Request(self.centre, self.tokens[-1]).key].loss

    def ranked(self) -> list[Allocation]:
        """Return what was measured at the last fidelity and fills the budget, best first."""
        return [allocation for _, allocation in sorted(self._filling)]

    def advance(self) -> bool:
        """Move the centre to the best allocation, and return whether it moved."""
        best, before = self.ranked()[0], self.centre
        self.centre = best
        self._fitted = self._fitted and best == before
        return best != before


def difference(one: Outcome, other: Outcome) -> Difference:
    """Return the paired difference of two outcomes on the same text."""
    assert one.request.tokens == other.request.tokens
    size = max((abs(one.loss) + abs(other.loss)) / 2, 1e-300)
    each = (np.array(one.sequence_losses) - np.array(other.sequence_losses)) / size
    return Difference(
        allocation=one.request.allocation,
        reference=other.request.allocation,
        value=(one.loss - other.loss) / size,
        tokens=one.request.tokens,
        error=float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else None,
        mean=size,
    )


class Scripted:
    """A script as a searcher."""

    def __init__(self, script: Script, ranked: Callable[[], Sequence[Allocation]]) -> None:
        """Run the script up to its first request; ``ranked`` tells what it holds for best."""
        self._script, self._ranked, self._end = script, ranked, ""
        self._asked: Sequence[Request] = []
        self._step(lambda: next(script))

    def ask(self) -> Sequence[Request]:
        """Return the script's next batch."""
        return self._asked

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Send the outcomes to the script."""
        self._step(lambda: self._script.send(outcomes))

    def ended(self) -> str:
        """Return why the script ended."""
        return self._end

    def finalists(self) -> Sequence[Allocation]:
        """Return what the script holds for best, best first."""
        return self._ranked()

    def _step(self, go: Callable[[], Sequence[Request]]) -> None:
        try:
            self._asked = go()
        except StopIteration as stop:
            self._asked, self._end = [], stop.value
