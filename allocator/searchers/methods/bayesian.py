"""Bayesian search by Optuna for one budget or a front, over the few coefficients of ``surrogates.shapes``.

Two samplers: the tree-structured Parzen estimator (Bergstra et al., 2011; of fronts, Ozaki et al., 2022) and a Gaussian
process with log expected improvement, of the loss or of a front's hypervolume (Ament et al., 2023). Both degrade in
many discrete dimensions under a constraint. Here there are at most 16 real dimensions and one for each cost, and every
point of the box is an allocation that fills its budget. So the objective is piecewise constant: points that give the
same allocation share its figures and cost one measurement.

A cost that is an objective adds a share in [0, 1]: the limit of a point, between the cost of the sparsest model and the
largest allowed cost. Allocations keep the run's budget and the limits of their point exactly, so no trial is
infeasible, and Optuna needs no constraint (``Trial.set_constraint``). It is told the true costs together with the loss.

Optuna's study is kept in memory only, and its samplers hold random numbers that a replay could not restore. So each
batch comes from a new study, made of the trials so far, and a new sampler, whose seed is a function of the search's
seed and the trial's number. Within a batch, each of Optuna's samplers counts pending trials in its own way: the Parzen
estimator among the bad trials (constant liar), the Gaussian process by integrating over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import optuna

from allocator.core.budget import Budget, find_ranges
from allocator.core.errors import UserError
from allocator.core.front import figure
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.surrogates.shapes import Shapes

GP_MAX_TRIALS = 300
"""Most trials of a Gaussian process, which factorises a square matrix of this size many times for one proposal."""

_STARTUP_TRIALS = 16
"""Proposals drawn at random, from which the first model is made."""

Point: TypeAlias = tuple[float, ...]
"""A share of each cost that is an objective, and the coefficients of a shape."""


@dataclass(frozen=True, slots=True)
class TpeSettings(MethodSettings):
    """Settings of the Parzen-estimator search.

    Attributes:
        trials: Number of proposals.
        batch: Proposals that are measured side by side.
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

    After a hundred trials, a proposal takes about a second. Every objective in addition to the loss and one cost makes
    it about four times as long.

    Attributes:
        trials: Number of proposals, at most 300.
        batch: Proposals that are measured side by side.
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
    """Optuna's sampler behind ask and tell: the loss, or losses and costs, all minimised within a budget."""

    def __init__(self, problem: SearchProblem, settings: TpeSettings | GpSettings) -> None:
        """Begin with the starts, and with the points that come nearest to them."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._budget, self._names = problem.space, problem.budget, tuple(problem.objectives)
        self._settings, self._seed = settings, problem.seed
        self._start = list(dict.fromkeys(problem.start))
        self._shapes = Shapes(problem.space)
        self._ranges = find_ranges(problem.space, problem.budget, problem.costs)
        self._box: dict[str, optuna.distributions.BaseDistribution] = {
            **{f"share of {cost}": optuna.distributions.FloatDistribution(0.0, 1.0) for cost in self._ranges},
            **{name: optuna.distributions.FloatDistribution(-1.0, 1.0) for name in self._shapes.names},
        }
        self._asked: list[tuple[Point, Allocation]] = []
        self._trials: list[optuna.trial.FrozenTrial] = []
        self._known: dict[Allocation, list[float]] = {}

    def ask(self) -> Sequence[Request]:
        """Return the next batch of proposals; the first also has the starts."""
        first = not self._trials
        if first:
            points = list(dict.fromkeys(map(self._nearest, self._start)))[: self._settings.trials]
        else:
            points = self._propose() if self._box else []
        self._asked = [(point, self._draw(point)) for point in points]
        drawn = [allocation for _, allocation in self._asked]
        allocations = dict.fromkeys([*self._start, *drawn] if first else drawn)
        return [Request(allocation=allocation, tokens=self._settings.tokens) for allocation in allocations]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Add the outcomes to the trials from which the next proposals are made."""
        self._known.update({outcome.request.allocation: self._values(outcome) for outcome in outcomes})
        for point, allocation in self._asked:
            params = dict(zip(self._box, point, strict=True))
            values = self._known[allocation]
            self._trials.append(optuna.trial.create_trial(params=params, distributions=self._box, values=values))

    def ended(self) -> str:
        """Return why the search ended."""
        if not self._box:
            return "units of one kind in one block leave no curve to choose"
        return f"all {self._settings.trials} trials are done"

    def finalists(self) -> Sequence[Allocation]:
        """Return the measured allocations, ordered by the objectives."""
        return sorted(self._known, key=lambda allocation: (self._known[allocation], allocation))

    def _values(self, outcome: Outcome) -> list[float]:
        """Return the objectives, costs as shares of their range: Optuna's reference point is 1.1 times the worst."""
        return [self._scaled(name, figure(self._space, outcome, name)) for name in self._names]

    def _scaled(self, name: str, value: float) -> float:
        low, high = self._ranges.get(name, (0, 1))
        return (value - low) / max(high - low, 1)

    def _draw(self, point: Point) -> Allocation:
        shares, coefficients = point[: len(self._ranges)], point[len(self._ranges) :]
        return self._shapes.allocation(coefficients, self._within(shares))

    def _nearest(self, allocation: Allocation) -> Point:
        """Return the shares of an allocation's costs, and the coefficients nearest to it within these costs."""
        shares = tuple(self._scaled(cost, self._space.cost(allocation, cost)) for cost in self._ranges)
        return (*shares, *self._shapes.nearest(allocation, self._within(shares)))

    def _within(self, shares: Sequence[float]) -> Budget:
        """Return the run's budget with each cost limited to a share of its range, exactly."""
        limits = {
            cost: low + round(Fraction(share) * (high - low))
            for (cost, (low, high)), share in zip(self._ranges.items(), shares, strict=True)
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
