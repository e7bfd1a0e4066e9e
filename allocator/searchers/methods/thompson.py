"""Thompson sampling of an additive model of the loss. Each sample of the model is minimised exactly.

Thompson (1933): draw a model from the posterior, measure its best allocation, learn. The model is
:mod:`allocator.searchers.surrogates.additive`, a table over units and levels. A knapsack finds the best allocation of a
table within the budget. So the search explores whole allocations, not moves: all draws agree where the posterior is
certain, and differ where it is not. The model holds only nearby, so draws are minimised within a trust region around
the best allocation so far, as in TuRBO (Eriksson et al., NeurIPS 2019). The size of the region is not adapted: the
draws of a batch take one level, two levels and so on in turn, and more when none of them is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.core.errors import UserError
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.solvers.knapsack import knapsack_nearby
from allocator.searchers.solvers.space_arrays import SpaceArrays
from allocator.searchers.surrogates.additive import POWERS, AdditiveModel

MAX_TRIALS = 2000
"""Most trials: the posterior factorises a square matrix of this size."""

_ROUNDS = 4
"""Rounds of draws without a new allocation, after which trust regions widen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThompsonSettings(MethodSettings):
    """Settings of Thompson sampling.

    Attributes:
        trials: Measured allocations in total, at most 2,000.
        patience: Batches without a better allocation after which the search ends.
        batch: Draws that are measured side by side.
        tokens: Tokens of every measurement.
        radius: Most levels that a unit moves from the best allocation so far. Draws take 1 to this in turn.
    """

    trials: int = 200
    patience: int = 8
    batch: int = 8
    tokens: int = 8192
    radius: int = 2

    def __post_init__(self) -> None:
        if min(self.trials, self.patience, self.batch, self.tokens, self.radius) < 1:
            raise UserError("search.thompson: trials, patience, batch, tokens and radius must be at least 1")
        if self.trials > MAX_TRIALS:
            raise UserError(
                f"search.thompson.trials: the model learns from at most {MAX_TRIALS} measurements in reasonable time, "
                f"found {self.trials}. Ask for fewer, or search with search.method=evolution"
            )

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the measurements, increasing."""
        return (self.tokens,)

    @property
    def num_batches(self) -> int:
        """Batches at most, baselines included."""
        return 2 + -(-self.trials // self.batch)

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        return Thompson(problem, self)


class Thompson:
    """Thompson sampling for one budget. See the module's text for the method and its source."""

    def __init__(self, problem: SearchProblem, settings: ThompsonSettings) -> None:
        """Begin with the starts. The best of them is the model's reference."""
        self._space, self._settings, self._seed = problem.space, settings, problem.seed
        self._arrays = SpaceArrays(problem.space, problem.budget)
        self._candidates = list(dict.fromkeys(problem.start))[: settings.trials]
        self._scored: dict[Allocation, float] = {}
        self._models: list[AdditiveModel] = []
        self._stale = 0
        self._end = ""

    def ask(self) -> Sequence[Request]:
        """Return the starts, then the best allocations of draws of the model."""
        return [Request(allocation=allocation, tokens=self._settings.tokens) for allocation in self._candidates]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Learn from the outcomes, and draw the next batch."""
        before = min(self._scored.values(), default=np.inf)
        self._scored.update({outcome.request.allocation: outcome.loss for outcome in outcomes})
        best = self.finalists()[0]
        self._stale = 0 if self._scored[best] < before else self._stale + 1
        if not self._models:
            reference = best, self._scored[best]
            self._models = [AdditiveModel(self._space, *reference, power) for power in POWERS]
        for model in self._models:
            model.learn([outcome.request.allocation for outcome in outcomes], [outcome.loss for outcome in outcomes])
        self._candidates = []
        if len(self._scored) == self._settings.trials:
            self._end = f"all {self._settings.trials} trials are done"
        elif self._stale == self._settings.patience:
            self._end = f"no better allocation for {self._stale} batches"
        else:
            self._candidates = self._propose(max(self._models, key=lambda model: model.likelihood), best)
            self._end = "the model's draws agree on allocations that were measured"

    def ended(self) -> str:
        """Return why the search ended."""
        return self._end

    def finalists(self) -> Sequence[Allocation]:
        """Return the measured allocations, best first."""
        return sorted(self._scored, key=lambda allocation: (self._scored[allocation], allocation))

    def _propose(self, model: AdditiveModel, best: Allocation) -> list[Allocation]:
        """Return the new best allocations of draws, each once, from the smallest trust regions that have any."""
        size = min(self._settings.batch, self._settings.trials - len(self._scored))
        rng = np.random.default_rng([self._seed, len(self._scored)])
        widest = max(self._settings.radius, *self._space.sparsest)
        children: dict[Allocation, None] = {}
        for wider in range(widest - self._settings.radius + 1):
            for _ in range(_ROUNDS):
                for number, table in enumerate(model.draw(size - len(children), rng)):
                    radius = 1 + wider + number % self._settings.radius
                    child = knapsack_nearby(self._arrays, table, best, radius)
                    if child not in self._scored:
                        children[child] = None
                if len(children) == size:
                    return list(children)
            if children:
                break
        return list(children)
