"""What a search that learns a model of the loss has measured, and that model."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import numpy as np

from allocator.core.budget import Budget
from allocator.core.protocols import Key, Outcome, Request
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.generator import Measuring, Steps
from allocator.searchers.solvers.knapsack import knapsack_nearby
from allocator.searchers.solvers.space_arrays import SpaceArrays
from allocator.searchers.surrogates.quadratic import Quadratic
from allocator.searchers.surrogates.surrogate import Difference, Surrogate
from allocator.searchers.surrogates.tabular import Tabular


class Memory:
    """What a script has measured, and the model of the loss that it has learned.

    Attributes:
        space: The search space.
        budget: What every allocation keeps to.
        arrays: The space as arrays.
        tokens: Fidelities, increasing. The last is that of finalists.
        expanding: Tokens of expansions around the centre; the last fidelity by default.
        centre: The best allocation at the last fidelity: where the search is.
        gradients: Whether the evaluator has gradients, as far as is known.
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
        self.arrays = SpaceArrays(space, budget)
        self.centre = start[0]
        self.gradients = True
        self._model: Tabular | Quadratic = Tabular(self.arrays, self.centre, self.tokens[-1])
        self._fitted = True
        self._known: dict[Key, Outcome] = {}
        self._filling: list[tuple[float, Allocation]] = []

    def measure(self, allocations: Iterable[Allocation], tokens: int) -> Measuring:
        """Request what was not measured yet, and return the outcomes of all allocations, in order."""
        requests = [Request(allocation=allocation, tokens=tokens) for allocation in dict.fromkeys(allocations)]
        if unknown := [request for request in requests if request.key not in self._known]:
            for outcome in (yield unknown):
                self._known[outcome.request.key] = outcome
                allocation = outcome.request.allocation
                if tokens == self.tokens[-1] and self.arrays.fills_budget(allocation):
                    self._filling.append((outcome.loss, allocation))
        return [self._known[request.key] for request in requests]

    def begin(self, start: Sequence[Allocation]) -> Steps:
        """Measure allocations at the last fidelity, and make the best of them the centre."""
        yield from self.measure(start, self.tokens[-1])
        self.advance()

    def move(self, budget: Budget) -> Steps:
        """Continue within another budget, from the best measured allocation there or the model's best."""
        table_ul = self.surrogate.table_ul
        self.budget, self.arrays = budget, SpaceArrays(self.space, budget)
        full = [
            outcome
            for outcome in self._known.values()
            if outcome.request == Request(allocation=outcome.request.allocation, tokens=self.tokens[-1])
        ]
        self._filling = [
            (outcome.loss, outcome.request.allocation)
            for outcome in full
            if self.arrays.fills_budget(outcome.request.allocation)
        ]
        fitted = self.arrays.fit_to_budget(self.centre, table_ul)
        yield from self.measure([fitted, self._minimise(self.arrays, table_ul)], self.tokens[-1])
        self.advance()

    def find_best_within(self, budget: Budget) -> Allocation:
        """Return the allocation that the model expects to lose least within another budget."""
        return self._minimise(SpaceArrays(self.space, budget), self.surrogate.table_ul)

    def _minimise(self, arrays: SpaceArrays, table_ul: np.ndarray) -> Allocation:
        fitted = arrays.fit_to_budget(self.centre, table_ul)
        return knapsack_nearby(arrays, table_ul, fitted, max(self.space.sparsest))

    def compare(
        self, allocations: Sequence[Allocation], tokens: int
    ) -> Generator[Sequence[Request], Sequence[Outcome], list[Difference]]:
        """Measure allocations and the centre on the same text, and show the differences to the model."""
        first, *others = yield from self.measure([self.centre, *allocations], tokens)
        differences = [subtract(other, first) for other in others]
        for difference in differences:
            self._model.observe(difference)
        self._fitted = False
        return differences

    def expand(self, few: int | None = None) -> Steps:
        """Learn how the loss begins to change around the centre, if the evaluator has gradients.

        From then on the model is quadratic. To measure a missing curvature, its unit takes one step on ``few`` tokens
        (those of the first fidelity by default), and the loss is expanded on the same tokens.
        """
        yield from self._expand(self.expanding)
        if not isinstance(self._model, Quadratic):
            return
        few = few or self.tokens[0]
        if len(units := self._model.find_missing_curvatures(few)):
            yield from self._expand(few)
            yield from self.compare([self._step(int(unit)) for unit in units], few)

    def _expand(self, tokens: int) -> Steps:
        request = Request(allocation=self.centre, tokens=tokens, probe="expansion")
        if not self.gradients:
            return
        if (outcome := self._known.get(request.key)) is None:
            (outcome,) = yield [request]
            self._known[request.key] = outcome
        elif tokens < self.expanding or (isinstance(self._model, Quadratic) and self._model.expanded_at == self.centre):
            return
        self.gradients = outcome.expansion is not None
        if self.gradients:
            if not isinstance(self._model, Quadratic):
                self._model = Quadratic(self.arrays, self.expanding)
            self._model.expand(outcome)
            self._fitted = False

    def _step(self, unit: int) -> Allocation:
        """Return the centre with a unit one level sparser, or denser if it is at its last level."""
        level = self.centre[unit]
        other = level + 1 if level < self.arrays.last_u[unit] else level - 1
        return (*self.centre[:unit], other, *self.centre[unit + 1 :])

    def is_measured(self, allocation: Allocation, tokens: int) -> bool:
        """Whether an allocation was measured at a fidelity."""
        return Request(allocation=allocation, tokens=tokens).key in self._known

    def is_measured_at_all(self, allocation: Allocation) -> bool:
        """Whether an allocation was measured at any fidelity."""
        return any(self.is_measured(allocation, tokens) for tokens in self.tokens)

    @property
    def surrogate(self) -> Surrogate:
        """The model around the centre, fitted to all differences so far."""
        if not self._fitted:
            self._model.refresh(self.centre)
            self._fitted = True
        return self._model

    @property
    def loss(self) -> float:
        """The loss of the centre at the last fidelity."""
        return self._known[Request(allocation=self.centre, tokens=self.tokens[-1]).key].loss

    def rank(self) -> list[Allocation]:
        """Return the allocations that fill the budget and were measured at the last fidelity, best first."""
        return [allocation for _, allocation in sorted(self._filling)]

    def advance(self) -> bool:
        """Move the centre to the best allocation, and return whether it moved."""
        best, before = self.rank()[0], self.centre
        self.centre = best
        self._fitted = self._fitted and best == before
        return best != before


def subtract(one: Outcome, other: Outcome) -> Difference:
    """Return the paired difference of two outcomes on the same text."""
    assert one.request.tokens == other.request.tokens
    size = max((abs(one.loss) + abs(other.loss)) / 2, 1e-300)
    change_n = (np.array(one.sequence_losses) - np.array(other.sequence_losses)) / size
    return Difference(
        allocation=one.request.allocation,
        reference=other.request.allocation,
        value=(one.loss - other.loss) / size,
        tokens=one.request.tokens,
        error=float(change_n.std(ddof=1) / np.sqrt(len(change_n))) if len(change_n) > 1 else None,
        mean=size,
    )
