"""A model of the loss from its expansions: known slopes, and a learned curvature for each unit.

Around an expanded allocation (:class:`~allocator.core.protocols.Expansion`), the loss of a level is its slope plus its
unit's curvature times its size. Slopes include what the errors of all units have in common. So the table is right at
the centre, and wrong only by how moved units affect each other.

One number per unit is left to learn. A single step from an expansion on the same text gives it at once; on few tokens,
to within a quarter. It hardly changes with the level (by a tenth on the packaged model) or as the search moves (by a
sixth from uniform to the best allocation), so one step of each unit is enough for a whole search. After that,
differences of whole allocations, measured anywhere, improve the curvatures by linear regression.

Shapes: U units, L levels of the longest ladder, n observations, N allocations.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import isnan

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from allocator.core.protocols import Outcome
from allocator.core.space import Allocation
from allocator.searchers.solvers.space_arrays import SpaceArrays
from allocator.searchers.surrogates.surrogate import Difference, Sampling, weigh

_DOUBT = 0.25
"""Relative deviation of a curvature that was measured by a single step on few tokens."""

_IGNORANCE = 1.0
"""Relative deviation of a curvature that was not measured. It is estimated from the curvatures of other units."""

_LEAST = 0.05
"""The least curvature, relative to the median; smaller ones are noise."""

_MISFIT = 0.25
"""Deviation of a difference from the model, relative to the root of its units' squared curvature terms."""

_DRIFT = 20.0
"""The same, once all units have moved. It grows with the pairs of moved units, which the model ignores."""

_ROUGHNESS = 0.1
"""Deviation of a level's loss from slope and curvature, relative to the latter."""

_REMEMBERED = 512
"""Number of newest differences that are learned from; older ones are further and further from the centre."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """An expansion as arrays.

    Attributes:
        allocation: The expanded allocation.
        tokens: Tokens of the expansion.
        loss: The loss of the allocation.
        slope_ul: First-order change of the loss. Beyond a unit's last level, that level is repeated.
        size_ul: Mean squared change of the output, padded likewise.
    """

    allocation: Allocation
    tokens: int
    loss: float
    slope_ul: np.ndarray
    size_ul: np.ndarray

    @classmethod
    def from_outcome(cls, outcome: Outcome, length: int) -> Expanded:
        """Read an outcome with an expansion, and pad ladders to a length."""
        assert outcome.expansion is not None
        slope_ul, size_ul = (
            np.array([[*row, *[row[-1]] * (length - len(row))] for row in rows])
            for rows in (outcome.expansion.slope, outcome.expansion.size)
        )
        return cls(
            allocation=outcome.request.allocation,
            tokens=outcome.request.tokens,
            loss=outcome.loss,
            slope_ul=slope_ul,
            size_ul=size_ul,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Observed:
    """A difference from an allocation that was expanded on all tokens.

    Attributes:
        size_u: Squared change of each unit's output.
        left: The difference of the loss less the slopes.
        away: Share of units that moved.
        tokens: Tokens of the measurement.
        error: Standard error of the difference; NaN if unknown.
    """

    size_u: np.ndarray
    left: float
    away: float
    tokens: int
    error: float


class Quadratic:
    """The model. It is recomputed from all observations, so it depends on nothing else.

    Attributes:
        table_ul: Expected change of the loss by each level, from the last allocation that was expanded on all tokens,
            as a share of its loss.
    """

    def __init__(self, arrays: SpaceArrays, tokens: int) -> None:
        """Begin without observations, for the loss on ``tokens`` tokens."""
        self._arrays, self._tokens = arrays, tokens
        self._units = np.arange(len(arrays.last_u))
        self._expanded: dict[tuple[Allocation, int], Expanded] = {}
        self._steps: list[tuple[int, int, float]] = []
        self._observed: deque[_Observed] = deque(maxlen=_REMEMBERED)
        self._sampling = Sampling(tokens)

    def expand(self, outcome: Outcome) -> None:
        """Take an expansion. From the next :meth:`refresh` on, the table is around the last one on all tokens."""
        found = Expanded.from_outcome(outcome, self._arrays.price_ul.shape[1])
        self._expanded[found.allocation, found.tokens] = found
        if found.tokens == self._tokens:
            self._base = found

    @property
    def expanded_at(self) -> Allocation:
        """The allocation that was last expanded on all tokens."""
        return self._base.allocation

    def observe(self, difference: Difference) -> None:
        """Take a measured difference from an allocation that was expanded on the same tokens or on all.

        A single step from an allocation that was expanded on the same tokens gives a curvature. Other differences are
        used by the regression.
        """
        level_u = np.array(difference.allocation)
        moved = np.flatnonzero(level_u != difference.reference)
        change = difference.value * difference.mean
        base = self._expanded.get((difference.reference, difference.tokens))
        if len(moved) == 1 and base is not None:
            unit, level = int(moved[0]), int(level_u[moved[0]])
            size = base.size_ul[unit, level]
            bend = (change - base.slope_ul[unit, level]) / size if size > 0 else np.nan
            self._steps.append((unit, difference.tokens, bend))
            return
        base = self._expanded.get((difference.reference, self._tokens))
        if len(moved) and base is not None:
            left = change - float(base.slope_ul[self._units, level_u].sum())
            error = np.nan if difference.error is None else difference.error * difference.mean
            size_u, away = base.size_ul[self._units, level_u], len(moved) / len(level_u)
            self._observed.append(_Observed(size_u=size_u, left=left, away=away, tokens=difference.tokens, error=error))

    def find_missing_curvatures(self, tokens: int) -> np.ndarray:
        """Return the units whose curvature is not measured on so many tokens, [n]. Units with one level have none."""
        told = [unit for unit, on, _ in self._steps if on >= tokens]
        return np.setdiff1d(np.flatnonzero(self._arrays.last_u > 0), told)

    def refresh(self, centre: Allocation) -> None:
        """Fit curvatures to all observations, around a new centre."""
        self._centre_u = np.array(centre)
        told_u, doubt_u = self._told()
        # of curvatures relative to those from single steps; every observation's row has at most the length 1 / _MISFIT
        precision_uu, bend_u = np.diag(doubt_u**-2.0), told_u
        if self._observed:
            curve_nu = np.multiply([one.size_u for one in self._observed], told_u)
            left_n = np.array([one.left for one in self._observed]) - curve_nu.sum(1)
            deviation_n = np.sqrt(self._variance(np.einsum("nu,nu->n", curve_nu, curve_nu)))
            curve_nu /= deviation_n[:, None]
            precision_uu += curve_nu.T @ curve_nu
        self._factor_uu = cholesky(precision_uu, lower=True, check_finite=False)
        if self._observed:
            more_u = cho_solve((self._factor_uu, True), curve_nu.T @ (left_n / deviation_n), check_finite=False)
            bend_u = told_u * (1.0 + more_u)
            bend_u = np.maximum(bend_u, _LEAST * np.median(bend_u))
        self._told_share_u = told_u / bend_u
        scale = abs(self._base.loss) or 1.0
        self._curve_ul = bend_u[:, None] * self._base.size_ul / scale
        self._slope_ul = self._base.slope_ul / scale
        self.table_ul = self._slope_ul + self._curve_ul

    def predict(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return how much more allocations [N, U] lose than the centre."""
        look_up = self._arrays.look_up
        return np.asarray(look_up(self.table_ul, levels_nu) - look_up(self.table_ul, self._centre_u))

    def estimate(self, levels_nu: np.ndarray, value_n: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Weigh measured differences against the expected ones. See :class:`Surrogate`."""
        curve_nu = self._curve_ul[self._units, levels_nu] - self._curve_ul[self._units, self._centre_u]
        size_n = np.sqrt(np.square(curve_nu).sum(1))
        misfit_n = _misfit((levels_nu != self._centre_u).mean(1))
        blur_n = np.sqrt(self._sampling.beyond(tokens)) * size_n
        return weigh(value_n, blur_n, self.predict(levels_nu), misfit_n * size_n)

    def deviation(self) -> np.ndarray:
        """Return the deviation of each level's loss relative to the centre's, [U, L]."""
        curve_ul = self._curve_ul - self._curve_ul[self._units, self._centre_u][:, None]
        inverse_uu = solve_triangular(self._factor_uu, np.eye(len(self._units)), lower=True, check_finite=False)
        relative_u = self._told_share_u * np.sqrt(np.square(inverse_uu).sum(0))
        return np.asarray(np.abs(curve_ul) * np.hypot(relative_u, _ROUGHNESS)[:, None])

    def cautious(self) -> np.ndarray:
        """Return the table itself: it was measured, and pessimism would make the first move too small."""
        return np.asarray(self.table_ul)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the table of a sample of the model."""
        normal_u, normal_ul = rng.standard_normal(len(self._units)), rng.standard_normal(self._curve_ul.shape)
        more_u = solve_triangular(self._factor_uu, normal_u, trans="T", lower=True, check_finite=False)
        bend_u = 1.0 + self._told_share_u * more_u
        return np.asarray(self._slope_ul + self._curve_ul * (1.0 + _ROUGHNESS * normal_ul) * bend_u[:, None])

    def _told(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each unit's curvature from its single steps on most tokens, and its relative deviation, [U] each."""
        told: dict[int, tuple[int, list[float]]] = {}
        for unit, tokens, bend in self._steps:
            if isnan(bend):  # the step did nothing
                continue
            most, each = told.get(unit, (0, []))
            if tokens > most:
                told[unit] = (tokens, [bend])
            elif tokens == most:
                each.append(bend)
        mean = {unit: sum(each) / len(each) for unit, (_, each) in told.items()}
        middle = float(np.median(list(mean.values()))) if mean else 0.0
        if middle <= 0 and mean:  # the loss is not convex; keep the size at least
            middle = float(np.median(np.abs(list(mean.values()))))
        bend_u = np.array([mean.get(unit, middle) for unit in range(len(self._units))])
        doubt_u = np.where(np.isin(self._units, list(mean)), _DOUBT, _IGNORANCE)
        return np.maximum(bend_u, max(_LEAST * middle, 1e-300)), doubt_u

    def _variance(self, square_n: np.ndarray) -> np.ndarray:
        """Return the variance of each observation about the model, from the sum of its squared curvature terms."""
        tokens_n = np.array([one.tokens for one in self._observed], dtype=float)
        error_n = np.array([one.error for one in self._observed])
        self._sampling.learn(error_n, tokens_n, square_n)
        misfit_n = _misfit(np.array([one.away for one in self._observed]))
        return np.asarray((misfit_n**2 + self._sampling.beyond(tokens_n)) * square_n + 1e-300)


def _misfit(away_n: np.ndarray) -> np.ndarray:
    """Return the model's deviation relative to the size of a change, when a share of all units has moved."""
    return np.asarray(np.hypot(_MISFIT, _DRIFT * np.square(away_n)))
