"""Bayesian search by Optuna for one budget or a front, over the few coefficients of ``surrogates.shapes``.

Two samplers: the tree-structured Parzen estimator (Bergstra et al., 2011; of fronts, Ozaki et al., 2022) and a Gaussian
process with log expected improvement, of the loss or of a front's hypervolume (Ament et al., 2023). Both degrade in
many discrete dimensions under a constraint; here there are at most 16 and one for each cost, real, and every point of
the box is an allocation that fills its budget. What they see is therefore piecewise constant: points that draw the same
allocation share its figures, and cost one measurement.

A cost that is an objective adds a share in [0, 1]: where between the sparsest model's and the loosest one's the limit
of a point lies. Points draw allocations within the run's budget and their own limits, exactly, so no trial is
infeasible, and there is nothing to tell Optuna as a constraint (``Trial.set_constraint``). What an allocation costs is
told as it is, beside the loss.

Optuna's study lives in memory and holds no truth, and its samplers keep random numbers that no replay could find
again. So each batch is asked of a new study, made of the trials told so far, and a new sampler, whose seed is a
function of the search's seed and the trial's number. Within a batch, Optuna counts what is pending as its own
methods do: the Parzen estimator among the bad trials (constant liar), the Gaussian process by integrating over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import optuna

from allocator.core.budget import Budget, spans
from allocator.core.errors import UserError
from allocator.core.front import figure
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.surrogates.shapes import Shapes

GP_MAX_TRIALS = 300
"""A Gaussian process factorises a matrix of trials squared, many times for one proposal."""

_STARTUP_TRIALS = 16
"""Proposals drawn at random, over which a first model is made."""

Point: TypeAlias = tuple[float, ...]
"""A share of each cost that is an objective, and the coefficients of a shape."""


@dataclass(frozen=True, slots=True)
class TpeSettings(MethodSettings):
    """Settings of the Parzen-estimator search.

    Attributes:
        trials: Proposals in all.
        batch: Proposals asked for at once, which workers measure side by side.
        tokens: Tokens of every measurement.
    """

    trials: int = 200
    batch: int = 8
    tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.trials, self.batch, self.tokens) < 1:
            raise UserError("search.tpe: trials, batch and tokens must be at least 1")

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
        return Bayesian(problem, self)


@dataclass(frozen=True, slots=True)
class GpSettings(MethodSettings):
    """Settings of the Gaussian-process search.

    A proposal takes about a second after a hundred trials, and some four times as long for every objective beside the
    loss and one cost.

    Attributes:
        trials: Proposals in all, at most 300.
        batch: Proposals asked for at once, which workers measure side by side.
        tokens: Tokens of every measurement.
    """

    trials: int = 120
    batch: int = 4
    tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.trials, self.batch, self.tokens) < 1:
            raise UserError("search.gp: trials, batch and tokens must be at least 1")
        if self.trials > GP_MAX_TRIALS:
            raise UserError(
                f"search.gp.trials: a Gaussian process takes at most {GP_MAX_TRIALS} trials in reasonable time, "
                f"found {self.trials}. Ask for fewer, or search with search.method=tpe"
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
        return Bayesian(problem, self)


class Bayesian:
    """Optuna's sampler behind ask/tell: the loss, or losses and costs, all minimised within a budget."""

    def __init__(self, problem: SearchProblem, settings: TpeSettings | GpSettings) -> None:
        """Begin with the starts, and with the points that come nearest to them."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._budget, self._names = problem.space, problem.budget, tuple(problem.objectives)
        self._settings, self._seed = settings, problem.seed
        self._start = list(dict.fromkeys(problem.start))
        self._shapes = Shapes(problem.space)
        self._spans = spans(problem.space, problem.budget, problem.costs)
        self._box: dict[str, optuna.distributions.BaseDistribution] = {
            **{f"share of {cost}": optuna.distributions.FloatDistribution(0.0, 1.0) for cost in self._spans},
            **{name: optuna.distributions.FloatDistribution(-1.0, 1.0) for name in self._shapes.names},
        }
        self._asked: list[tuple[Point, Allocation]] = []
        self._trials: list[optuna.trial.FrozenTrial] = []
        self._known: dict[Allocation, list[float]] = {}

    def ask(self) -> Sequence[Request]:
        """Return the next batch of proposals; before the first of them, the starts themselves."""
        first = not self._trials
        if first:
            points = list(dict.fromkeys(map(self._nearest, self._start)))[: self._settings.trials]
        else:
            points = self._propose() if self._box else []
        self._asked = [(point, self._draw(point)) for point in points]
        drawn = [allocation for _, allocation in self._asked]
        allocations = dict.fromkeys([*self._start, *drawn] if first else drawn)
        return [Request(allocation, self._settings.tokens) for allocation in allocations]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Add the outcomes to the trials of which the next proposals are asked."""
        self._known.update({outcome.request.allocation: self._values(outcome) for outcome in outcomes})
        for point, allocation in self._asked:
            params = dict(zip(self._box, point, strict=True))
            values = self._known[allocation]
            self._trials.append(optuna.trial.create_trial(params=params, distributions=self._box, values=values))

    def ended(self) -> str:
        """Return why nothing more is asked."""
        if not self._box:
            return "units of one kind in one block leave no curve to choose"
        return f"all {self._settings.trials} trials are done"

    def finalists(self) -> Sequence[Allocation]:
        """Return what was measured, ordered by what is minimised."""
        return sorted(self._known, key=lambda allocation: (self._known[allocation], allocation))

    def _values(self, outcome: Outcome) -> list[float]:
        """Return what is minimised, costs as shares: Optuna takes 1.1 of the worst for a reference point."""
        return [self._scaled(name, figure(self._space, outcome, name)) for name in self._names]

    def _scaled(self, name: str, value: float) -> float:
        low, high = self._spans.get(name, (0, 1))
        return (value - low) / max(high - low, 1)

    def _draw(self, point: Point) -> Allocation:
        shares, coefficients = point[: len(self._spans)], point[len(self._spans) :]
        return self._shapes.allocation(coefficients, self._within(shares))

    def _nearest(self, allocation: Allocation) -> Point:
        """Return the shares of an allocation's own costs, and the coefficients nearest to it within them."""
        shares = tuple(self._scaled(cost, self._space.cost(allocation, cost)) for cost in self._spans)
        return (*shares, *self._shapes.nearest(allocation, self._within(shares)))

    def _within(self, shares: Sequence[float]) -> Budget:
        """Return the run's budget, with each cost limited to a share of its span, exactly."""
        limits = {
            cost: low + round(Fraction(share) * (high - low))
            for (cost, (low, high)), share in zip(self._spans.items(), shares, strict=True)
        }
        return Budget(**{**self._budget.limits, **limits})

    def _propose(self) -> list[Point]:
        study = optuna.create_study(sampler=self._sampler(), directions=["minimize"] * len(self._trials[0].values))
        study.add_trials(self._trials)
        size = min(self._settings.batch, self._settings.trials - len(self._trials))
        proposals = [study.ask(self._box).params for _ in range(size)]
        return [tuple(params[name] for name in self._box) for params in proposals]

    def _sampler(self) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence([self._seed, len(self._trials)]).generate_state(1)[0])
        if isinstance(self._settings, GpSettings):
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
