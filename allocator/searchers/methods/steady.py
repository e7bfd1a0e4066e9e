"""Steady-state evolution with a fixed lag: proposals one by one, so that no worker waits for a generation.

Proposal t sees exactly the outcomes of proposals up to t - lag - 1, for any number and any speed of workers. So the
search is a function of its seed and lag. Up to lag + 1 proposals are measured at once, and none waits for the slowest
of a generation. The price is that parents are lag proposals old.

A proposal is either a child of the best known allocation (by the exchanges of
:mod:`allocator.searchers.methods.evolution`), measured on the first of the token sets, or a promotion. If fewer than
one in ``reduction`` of the allocations that a set has scored were promoted to the next set, the best of the others is
promoted. This is the asynchronous successive halving of ASHA (Li et al., "A system for massively parallel
hyperparameter tuning", MLSys 2020), with children of the incumbent in place of random draws, and promotions from the
highest set first. It differs from ASHA in one way: there a promotion sees all outcomes so far, here those up to the
lag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.core.errors import UserError
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation
from allocator.searchers.methods.evolution import propose_children
from allocator.searchers.problem import MethodSettings, SearchProblem

_ATTEMPTS = 512
"""Most draws of a child until a new one is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadySettings(MethodSettings):
    """Settings of steady-state evolution.

    Attributes:
        trials: Proposals, promotions included.
        patience: Proposals without a better allocation after which the search ends.
        lag: Proposals that are measured at once in addition to the oldest. Two or three for each worker keep workers
            busy. The lag is part of the search: with one lag, it is the same search on any number of workers.
        tokens: Token sets, increasing.
        reduction: One in this many allocations of a token set is promoted to the next.
        max_exchanges: A child differs by min(U{1..m}, U{1..m}) exchanges.
    """

    trials: int = 400
    patience: int = 200
    lag: int = 16
    tokens: tuple[int, ...] = (1024, 4096)
    reduction: int = 5
    max_exchanges: int = 3

    def __post_init__(self) -> None:
        if min(self.trials, self.patience, self.max_exchanges) < 1 or self.lag < 0 or self.reduction < 2:
            raise UserError(
                "search.steady: trials, patience and max_exchanges must be at least 1, reduction 2, and lag 0"
            )
        if list(self.tokens) != sorted(set(self.tokens)) or not self.tokens or self.tokens[0] < 1:
            raise UserError(f"search.steady.tokens: expected increasing counts, found {list(self.tokens)}")

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the measurements, increasing."""
        return self.tokens

    @property
    def num_batches(self) -> int:
        """Batches at most, baselines included."""
        return 2 + self.trials

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        return SteadyEvolution(problem, self)


class SteadyEvolution:
    """Steady-state evolution for one budget. See the module's text for the method and its source."""

    def __init__(self, problem: SearchProblem, settings: SteadySettings) -> None:
        """Begin at the best start."""
        self._problem, self._settings = problem, settings
        self._start = list(dict.fromkeys(problem.start))
        self._seen = set(self._start)
        self._scored: list[dict[Allocation, float]] = [{} for _ in settings.tokens]
        self._promoted: list[set[Allocation]] = [set() for _ in settings.tokens]
        self._parent, self._loss = self._start[0], float("inf")
        self._asked = self._told = self._better = 0
        self._end = ""

    def ask(self) -> Sequence[Request]:
        """Return the next proposal, given the outcomes so far; the first batch are the starts, on all tokens.

        The batch is empty if the search is over; a later outcome may change that.
        """
        if self._asked == 0:
            self._asked += 1
            return [Request(allocation=allocation, tokens=self._settings.tokens[-1]) for allocation in self._start]
        if self._asked > self._settings.trials:
            self._end = f"all {self._settings.trials} proposals are done"
            return []
        if self._told - self._better >= self._settings.patience:
            self._end = f"no better allocation for {self._told - self._better} proposals"
            return []
        request = self._promotion() or self._child()
        if request is None:
            self._end = f"no new allocation was drawn in {_ATTEMPTS} attempts"
            return []
        self._asked += 1
        return [request]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Take the outcome of the oldest proposal."""
        self._told += 1
        last = len(self._settings.tokens) - 1
        for outcome in outcomes:
            rung, allocation = self._settings.tokens.index(outcome.request.tokens), outcome.request.allocation
            self._scored[rung][allocation] = outcome.loss
            if rung == last and (outcome.loss, allocation) < (self._loss, self._parent):
                self._loss, self._parent, self._better = outcome.loss, allocation, self._told

    def ended(self) -> str:
        """Return why the search ended."""
        return self._end

    def finalists(self) -> Sequence[Allocation]:
        """Return the allocations that were scored on all tokens, best first."""
        scored = self._scored[-1]
        return sorted(scored, key=lambda allocation: (scored[allocation], allocation))

    def _promotion(self) -> Request | None:
        """Return the request of the next promotion, from the highest set that has one."""
        for rung in reversed(range(len(self._settings.tokens) - 1)):
            scored, promoted = self._scored[rung], self._promoted[rung]
            if len(promoted) < len(scored) // self._settings.reduction:
                waiting = [allocation for allocation in scored if allocation not in promoted]
                best = min(waiting, key=lambda allocation: (scored[allocation], allocation))
                promoted.add(best)
                return Request(allocation=best, tokens=self._settings.tokens[rung + 1])
        return None

    def _child(self) -> Request | None:
        rng = np.random.default_rng([self._problem.seed, self._asked])
        for child in propose_children(
            self._problem.space,
            self._parent,
            self._problem.budget,
            rng,
            max_exchanges=self._settings.max_exchanges,
            within_kind=False,
            attempts=_ATTEMPTS,
        ):
            if child not in self._seen:
                self._seen.add(child)
                return Request(allocation=child, tokens=self._settings.tokens[0])
        return None
