"""A model of the loss from its expansions: slopes that are known, and a curvature for each unit that is learned.

Around an allocation that was expanded (:class:`~allocator.core.protocols.Expansion`), a level loses its slope plus its
unit's curvature times its size. Slopes hold what a unit's error has in common with those of all others, so that the
table is right where the search is, and wrong only by what moved units do to each other.

What is left to learn is one number per unit. A single step from an expansion on the same text tells it at once, up to a
quarter on few tokens; it hardly changes with the level, nor as the search moves (on the packaged model by a tenth, and
by a sixth from uniform to the best allocation), so that one step of each unit does for a whole search. Differences of
whole allocations then teach curvatures by linear regression, wherever they were measured.

Shapes: U units, L levels of the longest ladder, n observations, N allocations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.core.protocols import Outcome
from allocator.core.space import Allocation
from allocator.search.ladders import Ladders
from allocator.search.surrogate import Difference, weighed

_DOUBT = 0.25
"""Relative deviation of a curvature that a single step on few tokens told."""

_IGNORANCE = 1.0
"""Relative deviation of a curvature of which nothing is known but those of others."""

_LEAST = 0.05
"""The least curvature, relative to the median: less is noise."""

_MISFIT = 0.25
"""Deviation of a difference from the model, relative to the root of its units' squared curvature terms."""

_DRIFT = 20.0
"""The same, once all units have moved: it grows with the number of pairs that have; the model knows nothing of them."""

_ROUGHNESS = 0.1
"""Deviation of a level's loss from slope and curvature, relative to the latter."""

_SAMPLING = 128.0
"""Relative variance of a difference on one token, where it is not known."""


@dataclass(frozen=True, slots=True)
class Expanded:
    """An expansion as arrays.

    Attributes:
        allocation: Around what.
        tokens: On how many tokens.
        loss: There.
        slope_ul: First-order change of the loss; beyond a unit's last level, that level again.
        size_ul: Mean squared change of the output, likewise.
    """

    allocation: Allocation
    tokens: int
    loss: float
    slope_ul: np.ndarray
    size_ul: np.ndarray

    @classmethod
    def of(cls, outcome: Outcome, length: int) -> Expanded:
        """Take an outcome with an expansion; ladders are filled up to a length."""
        assert outcome.expansion is not None
        slope_ul, size_ul = (
            np.array([[*row, *[row[-1]] * (length - len(row))] for row in rows])
            for rows in (outcome.expansion.slope, outcome.expansion.size)
        )
        return cls(outcome.request.allocation, outcome.request.tokens, outcome.loss, slope_ul, size_ul)


class Quadratic:
    """The model. Everything is recomputed from what was observed, so that it depends on nothing else.

    Attributes:
        table_ul: Expected loss of each level, relative to that of the last expansion on all tokens.
    """

    def __init__(self, ladders: Ladders, tokens: int) -> None:
        """Begin with nothing known; the loss to model is that on so many tokens."""
        self._ladders, self._tokens = ladders, tokens
        self._units = np.arange(len(ladders.last_u))
        self._expanded: dict[tuple[Allocation, int], Expanded] = {}
        self._steps: list[tuple[int, int, float]] = []
        self._observed: list[Difference] = []
        self._sampling = _SAMPLING

    def expand(self, outcome: Outcome) -> None:
        """Take an expansion; the table is around the last one on all tokens, from the next :meth:`refresh` on."""
        found = Expanded.of(outcome, self._ladders.cost_ul.shape[1])
        self._expanded[found.allocation, found.tokens] = found
        if found.tokens == self._tokens:
            self._base = found

    def observe(self, difference: Difference) -> None:
        """Take a measured difference from an allocation that was expanded on as many tokens, or on all."""
        pairs = enumerate(zip(difference.allocation, difference.reference, strict=True))
        moved = [unit for unit, (one, other) in pairs if one != other]
        around = self._expanded.get((difference.reference, difference.tokens))
        if len(moved) == 1 and around is not None:
            unit, level = moved[0], difference.allocation[moved[0]]
            change = difference.value * difference.mean - around.slope_ul[unit, level]
            size = around.size_ul[unit, level]
            self._steps.append((unit, difference.tokens, change / size if size > 0 else np.nan))
        elif moved and (difference.reference, self._tokens) in self._expanded:
            self._observed.append(difference)

    def unbent(self, tokens: int) -> np.ndarray:
        """Return units with a choice whose curvature no single step on so many tokens has told, [n]."""
        told = [unit for unit, on, _ in self._steps if on >= tokens]
        return np.setdiff1d(np.flatnonzero(self._ladders.last_u > 0), told)

    def refresh(self, centre: Allocation) -> None:
        """Fit curvatures to all observations, around where the search is now."""
        self._centre_u = np.array(centre)
        base, (bend_u, doubt_u) = self._base, self._told()
        covariance_uu = np.diag((doubt_u * bend_u) ** 2)
        if self._observed:
            around = [self._expanded[one.reference, self._tokens] for one in self._observed]
            size_nu = np.array(
                [
                    a.size_ul[self._units, np.array(one.allocation)]
                    for a, one in zip(around, self._observed, strict=True)
                ]
            )
            change_n = np.array(
                [
                    one.value * one.mean - a.slope_ul[self._units, np.array(one.allocation)].sum()
                    for a, one in zip(around, self._observed, strict=True)
                ]
            )
            variance_n = self._variance(np.square(size_nu * bend_u).sum(1))
            gain_un = covariance_uu @ size_nu.T
            spread_nn = size_nu @ gain_un + np.diag(variance_n)
            solved = np.linalg.solve(spread_nn, np.column_stack([change_n - size_nu @ bend_u, gain_un.T]))
            bend_u = np.maximum(bend_u + gain_un @ solved[:, 0], _LEAST * np.median(bend_u))
            covariance_uu = covariance_uu - gain_un @ solved[:, 1:]
        scale = abs(base.loss) or 1.0
        self._curve_ul = bend_u[:, None] * base.size_ul / scale
        self._slope_ul = base.slope_ul / scale
        self.table_ul = self._slope_ul + self._curve_ul
        self._bend_u, self._covariance_uu = bend_u, covariance_uu

    def predict(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return how much more allocations [N, U] lose than the centre."""
        look_up = self._ladders.look_up
        return np.asarray(look_up(self.table_ul, levels_nu) - look_up(self.table_ul, self._centre_u))

    def estimate(self, levels_nu: np.ndarray, value_n: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Weigh what was measured on few tokens against what is expected. See :class:`Surrogate`."""
        blur = np.sqrt(self._sampling * max(1 / tokens - 1 / self._tokens, 0.0))
        curve_nu = self._curve_ul[self._units, levels_nu] - self._curve_ul[self._units, self._centre_u]
        size_n = np.sqrt(np.square(curve_nu).sum(1))
        misfit_n = _misfit((levels_nu != self._centre_u).mean(1))
        return weighed(value_n, blur * size_n, self.predict(levels_nu), misfit_n * size_n)

    def deviation(self) -> np.ndarray:
        """Return the deviation of each level's loss relative to the centre's, [U, L]."""
        curve_ul = self._curve_ul - self._curve_ul[self._units, self._centre_u][:, None]
        relative_u = np.sqrt(np.maximum(self._covariance_uu.diagonal(), 0.0)) / self._bend_u
        return np.asarray(np.abs(curve_ul) * np.hypot(relative_u, _ROUGHNESS)[:, None])

    def cautious(self) -> np.ndarray:
        """Return the table: it is as sure of large moves as of small ones."""
        return np.asarray(self.table_ul)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the table of a sample of the model."""
        bend_u = rng.multivariate_normal(self._bend_u, self._covariance_uu, method="eigh")
        rough_ul = 1.0 + _ROUGHNESS * rng.standard_normal(self._curve_ul.shape)
        return np.asarray(self._slope_ul + self._curve_ul * rough_ul * (bend_u / self._bend_u)[:, None])

    def _told(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what single steps say of each unit's curvature, those on most text, and how unsure that is, [U]."""
        told: dict[int, tuple[int, list[float]]] = {}
        for unit, tokens, bend in self._steps:
            if np.isnan(bend):  # the step did nothing
                continue
            most, each = told.get(unit, (0, []))
            if tokens > most:
                told[unit] = (tokens, [bend])
            elif tokens == most:
                each.append(bend)
        mean = {unit: float(np.mean(each)) for unit, (_, each) in told.items()}
        middle = float(np.median(list(mean.values()))) if mean else 0.0
        if middle <= 0 and mean:  # the loss is not convex: at least of that size
            middle = float(np.median(np.abs(list(mean.values()))))
        bend_u = np.array([mean.get(unit, middle) for unit in range(len(self._units))])
        doubt_u = np.where(np.isin(self._units, list(mean)), _DOUBT, _IGNORANCE)
        return np.maximum(bend_u, max(_LEAST * middle, 1e-300)), doubt_u

    def _variance(self, square_n: np.ndarray) -> np.ndarray:
        """Return the variance of each observation about the model, from the sum of its squared curvature terms."""
        tokens_n = np.array([one.tokens for one in self._observed], dtype=float)
        error_n = np.array([np.nan if one.error is None else one.error * one.mean for one in self._observed])
        known_n = np.isfinite(error_n)
        if known_n.any():
            self._sampling = float((error_n**2 * tokens_n)[known_n].sum() / max(square_n[known_n].sum(), 1e-300))
        few_n = np.maximum(self._sampling * (1 / tokens_n - 1 / self._tokens), 0.0)
        away_n = np.array([np.mean(np.array(one.allocation) != one.reference) for one in self._observed])
        return np.asarray((_misfit(away_n) ** 2 + few_n) * square_n + 1e-300)


def _misfit(away_n: np.ndarray) -> np.ndarray:
    """Return how far the model may be off, relative to the size of a change, when a share of all units has moved."""
    return np.asarray(np.hypot(_MISFIT, _DRIFT * np.square(away_n)))
