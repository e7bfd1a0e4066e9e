"""A model of the loss that learns from differences alone: additive over (unit, level), with a few pairs of units.

It is for evaluators without gradients. With gradients, :mod:`allocator.searchers.surrogates.quadratic` knows more from
fewer measurements.

The method is Bayesian linear regression. The loss of a unit at a level is the sum of its increments up to that level.
The prior mean of an increment is proportional to the cost that the step removes, and grows exponentially with sparsity.
Its prior deviation is proportional to that mean and correlated along the ladder, so a unit that is sensitive at one
step is expected to be sensitive at the next. Scale, growth and deviation are fitted to single steps, as profiles
measure them.

An observation is the difference between two allocations on the same text (common random numbers), relative to their
loss. That cancels the difficulty of the text, and the fact that losses of units shrink with the loss of the whole. Two
errors, both relative to the size of the change, separate it from the loss on all tokens. The first is the misfit of the
model, which grows with the distance of the observation from the centre. The second, on few tokens, is the difference of
these from the other tokens, known from the spread over sequences. It is common to all observations of a unit on the
same tokens, so measuring there again teaches nothing.

Additivity holds only nearby. So pairs of units whose joint change explains the residual of the additive terms are added
one by one, each with a bilinear term, as in orthogonal matching pursuit (Pati et al., 1993).

Shapes: U units, L levels, F = U·L entries of the table, n observations, p pairs, N allocations to predict.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.sparse import block_diag, csr_array

from allocator.core.space import Allocation
from allocator.searchers.solvers.space_arrays import SpaceArrays
from allocator.searchers.surrogates.surrogate import Difference, Sampling, weigh

_GROWTH = 5.0
"""Growth of increments per unit of sparsity before any is measured: each step of 0.1 costs 1.6 times the one before."""

_GROWTH_RANGE = (0.0, 12.0)

_SPREAD = 0.8
"""Deviation of the logarithm of a step's loss per cost, before enough steps are measured."""

_SPREAD_RANGE = (0.3, 1.5)

_COMMON = 0.5
"""Share of an increment's prior variance that all increments of its unit have in common."""

_REACH = 2.0
"""Levels over which the rest of the correlation falls to 1/e."""

_TILT = 2.0
"""Deviation of a unit's growth from the common one, per unit of sparsity, relative to the increment."""

_MISFIT = 0.1
"""Deviation of a difference from the model, relative to the change, at the centre."""


_DRIFT = 2.0
"""The same deviation once every unit has moved away from the measured allocation."""

_PESSIMISM = 0.25
"""Deviations that are added to the expected loss of a level for cautious moves."""

_PAIR_DEVIATION = 0.5
"""Prior deviation of a pair's term when both units move one level, relative to the geometric mean of increments."""

_PAIRS_PER_ROUND = 6
_PAIR_ROUNDS = 6
_OBSERVATIONS_PER_PAIR = 4


class Tabular:
    """The model. It is recomputed from all observations, so it depends on nothing else.

    Attributes:
        table_ul: Expected loss of each level, up to a constant for each unit.
    """

    def __init__(self, arrays: SpaceArrays, centre: Allocation, tokens: int) -> None:
        """Begin without observations, around a centre, for the loss on ``tokens`` tokens."""
        self._arrays = arrays
        self._observed: list[Difference] = []
        self._sampling = Sampling(tokens)
        self._units = np.arange(len(arrays.last_u))
        self._shape = arrays.price_ul.shape
        self._mid_ul = (arrays.sparsity_ul[:, 1:] + arrays.sparsity_ul[:, :-1]) / 2
        self._removed_ul = arrays.price_ul[:, :-1] - arrays.price_ul[:, 1:]
        self.refresh(centre)

    def observe(self, difference: Difference) -> None:
        """Take a measured difference, which counts from the next :meth:`refresh` on."""
        if difference.allocation != difference.reference:
            self._observed.append(difference)

    def refresh(self, centre: Allocation) -> None:
        """Fit the model to all observations, around a new centre."""
        self._centre_u = np.array(centre)
        self._step_ul, self._deviation = self._prior()
        self.table_ul = _sums(self._step_ul)
        self._covariance_ull = self._prior_covariance()
        self._pairs_p2 = np.zeros((0, 2), dtype=int)
        self._weight_p = np.zeros(0)
        if self._observed:
            self._fit()
        self._deviation_ul: np.ndarray | None = None

    def predict(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return how much more allocations [N, U] lose than the centre."""
        arrays = self._arrays
        more_n = arrays.look_up(self.table_ul, levels_nu) - arrays.look_up(self.table_ul, self._centre_u)
        return np.asarray(more_n + self._joint(levels_nu) @ self._weight_p)

    def estimate(self, levels_nu: np.ndarray, value_n: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Weigh measured differences against the expected ones. See :class:`Surrogate`."""
        size_n = np.sqrt(self._size(levels_nu, self._centre_u))
        blur_n = np.sqrt(self._sampling.beyond(tokens)) * size_n
        return weigh(value_n, blur_n, self.predict(levels_nu), _MISFIT * size_n)

    def deviation(self) -> np.ndarray:
        """Return the posterior deviation of each level's loss relative to the centre's, [U, L]."""
        if self._deviation_ul is None:
            self._deviation_ul = self._deviations()
        return self._deviation_ul

    def _deviations(self) -> np.ndarray:
        units, centre_u, covariance_ull = self._units, self._centre_u, self._covariance_ull
        own_ul = covariance_ull.diagonal(axis1=1, axis2=2)
        variance_ul = own_ul + own_ul[units, centre_u][:, None] - 2 * covariance_ull[units, centre_u]
        if self._observed:
            gain_nul = self._gain.toarray().reshape(-1, *self._shape)
            relative_nf = (gain_nul - gain_nul[:, units, centre_u][:, :, None]).reshape(len(gain_nul), -1)
            whitened_nf = solve_triangular(self._factor[0], relative_nf, lower=True, check_finite=False)
            variance_ul = variance_ul - np.square(whitened_nf).sum(0).reshape(self._shape)
        return np.asarray(np.sqrt(np.maximum(variance_ul, 0.0)))

    def cautious(self) -> np.ndarray:
        """Return a table of losses that are a little higher than expected, for moves that must not disappoint."""
        return np.asarray(self.table_ul + _PESSIMISM * self.deviation())

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the table of a sample of the model, with independent levels."""
        return np.asarray(self.table_ul + rng.standard_normal(self._shape) * self.deviation())

    def _prior(self) -> tuple[np.ndarray, float]:
        """Return the prior mean of every increment, and the deviation relative to it."""
        rates: dict[int, list[tuple[float, float]]] = {}
        for one in self._observed:
            moved = [u for u, (a, b) in enumerate(zip(one.allocation, one.reference, strict=True)) if a != b]
            ends = sorted((one.allocation[moved[0]], one.reference[moved[0]]))
            if len(moved) > 1 or ends[1] - ends[0] > 1:
                continue
            unit, low = moved[0], ends[0]
            loss = one.value if one.allocation[unit] > low else -one.value
            if loss > 0 and self._removed_ul[unit, low] > 0:
                rates.setdefault(unit, []).append((self._mid_ul[unit, low], np.log(loss / self._removed_ul[unit, low])))
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for each in rates.values() for a in each for b in each if b[0] > a[0]]
        growth = float(np.clip(np.median(slopes), *_GROWTH_RANGE)) if slopes else _GROWTH
        logs = np.array([log - growth * mid for each in rates.values() for mid, log in each])
        middle = float(np.median(logs)) if len(logs) else 0.0
        # the standard deviation of a normal distribution with this median deviation
        spread = float(np.median(np.abs(logs - middle))) * 1.4826 if len(logs) > 2 else _SPREAD
        spread = float(np.clip(spread, *_SPREAD_RANGE))
        mean_ul = np.exp(middle + spread**2 / 2 + growth * self._mid_ul) * self._removed_ul  # of a log-normal
        return mean_ul, float(np.sqrt(np.expm1(spread**2)))

    def _prior_covariance(self) -> np.ndarray:
        """Return the covariance of a unit's losses over its levels, [U, L, L]."""
        level = np.arange(self._shape[1] - 1)
        near = _COMMON + (1 - _COMMON) * np.exp(-np.abs(level[:, None] - level) / _REACH)
        away_ul = self._mid_ul - self._arrays.sparsity_ul[self._units, self._centre_u][:, None]
        relative_ull = self._deviation**2 * near + _TILT**2 * away_ul[:, :, None] * away_ul[:, None, :]
        steps_ull = relative_ull * self._step_ul[:, :, None] * self._step_ul[:, None, :]
        below = np.tri(self._shape[1], self._shape[1] - 1, -1)
        return np.asarray(below @ steps_ull @ below.T)

    def _fit(self) -> None:
        one_nu = np.array([one.allocation for one in self._observed])
        other_nu = np.array([one.reference for one in self._observed])
        changes_nf = self._changes(one_nu, other_nu)
        self._gain = csr_array(changes_nf @ block_diag(self._covariance_ull, format="csr"))
        noise_n, blur_nn = self._noise(one_nu, other_nu)
        left_n = np.array([one.value for one in self._observed]) - changes_nf @ self.table_ul.ravel()
        additive_nn = (self._gain @ changes_nf.T).toarray() * (1.0 + blur_nn)
        joint_np = np.zeros((len(left_n), 0))
        for _ in range(_PAIR_ROUNDS + 1):
            spread_nn = additive_nn + _PAIR_DEVIATION**2 * joint_np @ joint_np.T
            spread_nn[np.diag_indices_from(spread_nn)] += noise_n
            self._factor = cho_factor(spread_nn, lower=True, check_finite=False)
            solved_n = cho_solve(self._factor, left_n, check_finite=False)
            found_p2 = self._screen(solved_n, one_nu, other_nu, noise_n + 0.1 * additive_nn.diagonal())
            if not len(found_p2) or len(self._pairs_p2) + len(found_p2) > len(left_n) // _OBSERVATIONS_PER_PAIR:
                break
            self._pairs_p2 = np.concatenate([self._pairs_p2, found_p2])
            joint_np = self._joint(one_nu) - self._joint(other_nu)
        self._weight_p = _PAIR_DEVIATION**2 * joint_np.T @ solved_n
        self.table_ul = self.table_ul + (self._gain.T @ solved_n).reshape(self._shape)

    def _screen(
        self, solved_n: np.ndarray, one_nu: np.ndarray, other_nu: np.ndarray, variance_n: np.ndarray
    ) -> np.ndarray:
        """Return the pairs that explain most of the residual, if they explain more than chance would.

        The gain of a pair in log-likelihood is computed for independent observations with ``variance_n``.
        """
        one, other, weight_n1 = self._moved(one_nu), self._moved(other_nu), 1.0 / variance_n[:, None]
        score_uu = (one * solved_n[:, None]).T @ one - (other * solved_n[:, None]).T @ other
        square_uu = (one**2 * weight_n1).T @ one**2 + (other**2 * weight_n1).T @ other**2
        square_uu -= 2 * (one * other * weight_n1).T @ (one * other)
        gain_uu = np.triu(score_uu**2 / (square_uu + _PAIR_DEVIATION**-2), 1) / 2
        gain_uu[tuple(self._pairs_p2.T)] = 0.0
        count = len(self._units)
        enough = 1.0 + np.log(max(1, count * (count - 1) // 2))
        order = np.argsort(-gain_uu, axis=None, kind="stable")[:_PAIRS_PER_ROUND]
        best_p2 = np.stack(np.unravel_index(order, gain_uu.shape), axis=1)
        return np.asarray(best_p2[gain_uu[tuple(best_p2.T)] > enough])

    def _moved(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return how far each unit is from the centre, in levels, times the root of its increment there, [N, U]."""
        last_u = np.maximum(self._arrays.last_u - 1, 0)
        root_u = np.sqrt(self._step_ul[self._units, np.minimum(self._centre_u, last_u)])
        return np.asarray((levels_nu - self._centre_u) * root_u)

    def _joint(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return the bilinear terms of the chosen pairs, [N, p]."""
        moved_nu = self._moved(levels_nu)
        return np.asarray(moved_nu[:, self._pairs_p2[:, 0]] * moved_nu[:, self._pairs_p2[:, 1]])

    def _changes(self, one_nu: np.ndarray, other_nu: np.ndarray) -> csr_array:
        """Return the entries of the table that each observation adds and subtracts, [n, F]."""
        rows, units = np.nonzero(one_nu != other_nu)
        base = units * self._shape[1]
        columns = np.concatenate([base + one_nu[rows, units], base + other_nu[rows, units]])
        values = np.concatenate([np.ones(len(rows)), -np.ones(len(rows))])
        size = (len(one_nu), self._shape[0] * self._shape[1])
        return csr_array((values, (np.concatenate([rows, rows]), columns)), shape=size)

    def _size(self, one_nu: np.ndarray, other_nu: np.ndarray) -> np.ndarray:
        """Return the sum over units of the squared expected changes, [N]."""
        sums_ul = _sums(self._step_ul)
        return np.asarray(np.square(sums_ul[self._units, one_nu] - sums_ul[self._units, other_nu]).sum(-1))

    def _noise(self, one_nu: np.ndarray, other_nu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the variance of each observation about the model, [n], and the covariance that few tokens add, [n, n].

        The latter is relative to the prior covariance of the two observations.
        """
        size_n = self._size(one_nu, other_nu)
        tokens_n = np.array([one.tokens for one in self._observed], dtype=float)
        error_n = np.array([np.nan if one.error is None else one.error for one in self._observed])
        self._sampling.learn(error_n, tokens_n, size_n)
        away_n = (other_nu != self._centre_u).mean(1)
        blur_n = self._sampling.beyond(tokens_n) / self._deviation**2
        blur_nn = blur_n * (tokens_n[:, None] == tokens_n)
        return (_MISFIT**2 + _DRIFT**2 * away_n) * size_n + 1e-300, blur_nn


def _sums(step_ul: np.ndarray) -> np.ndarray:
    """Return the sum of the increments below each level, [U, L]."""
    return np.pad(step_ul.cumsum(1), ((0, 0), (1, 0)))
