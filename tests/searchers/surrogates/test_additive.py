import itertools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal

from allocator.searchers.surrogates.additive import POWERS, AdditiveModel

REFERENCE = (2, 1, 1)


@pytest.fixture
def small(make_space):
    return make_space([[100, 60, 50, 0], [40, 20], [90, 60, 30]])


def _prior(space, power):
    """Mean [terms] and covariance [terms, terms] of each unit's level against the reference, from the text alone."""
    saved = [[1 - left / unit.params[0] for left in unit.params] for unit in space.units]
    steps = [
        [unit.params[0] * (b**power - a**power) for a, b in itertools.pairwise(x)]
        for unit, x in zip(space.units, saved, strict=True)
    ]
    scale = np.concatenate(steps).mean()
    terms = [(u, level) for u, unit in enumerate(space.units) for level in range(unit.num_levels)]

    def passed(u, level):
        """Increments from the reference's level to this one, signed."""
        low, high = sorted((level, REFERENCE[u]))
        return {j: (1 if level > REFERENCE[u] else -1) * steps[u][j] / scale for j in range(low, high)}

    mean = np.array([sum(passed(*term).values()) for term in terms])
    covariance = np.zeros((len(terms), len(terms)))
    for (i, (u, level)), (k, (v, other)) in itertools.product(enumerate(terms), repeat=2):
        if u == v:
            pairs = itertools.product(passed(u, level).items(), passed(v, other).items())
            covariance[i, k] = sum(a * b * 0.8 ** abs(j - m) for (j, a), (m, b) in pairs)
    return terms, mean, covariance


def _posterior(space, power, allocations, differences):
    terms, mean, covariance = _prior(space, power)
    rows = np.array([[float(allocation[u] == level) for u, level in terms] for allocation in allocations])
    best = (-np.inf,)
    for error in (0.03, 0.1, 0.3, 1.0, 3.0):
        noise = error**2 * (np.eye(len(rows)) + 1.0)
        total = rows @ covariance @ rows.T + noise

        def unlikely(log_scale, total=total):
            scale = np.exp(log_scale)
            return -multivariate_normal.logpdf(differences, scale * rows @ mean, scale**2 * total)

        found = minimize_scalar(unlikely, bounds=(-12, 6), method="bounded", options={"xatol": 1e-10})
        best = max(best, (-found.fun, np.exp(found.x), total))
    likelihood, scale, total = best
    gain = covariance @ rows.T @ np.linalg.inv(total)
    return likelihood, mean + gain @ (differences / scale - rows @ mean), covariance - gain @ rows @ covariance


def _told(spread):
    rng = np.random.default_rng(1)
    every = [a for a in itertools.product(range(4), range(2), range(3)) if a != REFERENCE]
    told = [every[i] for i in rng.permutation(len(every))[:9]]
    losses = [1.0 + 0.05 * (3 * a[0] + a[1] + 2 * a[2]) + spread * rng.normal() for a in told]
    return told, losses, 1.0 + 0.05 * 9


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3])
def test_draws_are_of_the_posterior(small, power, spread):
    told, losses, base = _told(spread)
    model = AdditiveModel(small, REFERENCE, base, power)
    model.learn([REFERENCE, *told[:4]], [base, *losses[:4]])
    model.learn(told[4:], losses[4:])
    drawn = model.draw(40_000, np.random.default_rng(0))
    terms, _, _ = _prior(small, power)
    table = np.stack([drawn[:, u, level] for u, level in terms], axis=1)
    _, mean, covariance = _posterior(small, power, told, np.log(losses) - np.log(base))
    np.testing.assert_allclose(table.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(table.T), covariance, atol=0.12)


def test_likelihoods_compare_powers(small):
    told, losses, base = _told(0.02)
    found, expected = [], []
    for power in POWERS:
        model = AdditiveModel(small, REFERENCE, base, power)
        model.learn(told, losses)
        found.append(model.likelihood)
        expected.append(_posterior(small, power, told, np.log(losses) - np.log(base))[0])
    np.testing.assert_allclose(np.diff(found), np.diff(expected), atol=1e-5)


@pytest.mark.parametrize("power", POWERS)
def test_before_any_outcome_draws_are_of_the_prior(small, power):
    model = AdditiveModel(small, REFERENCE, 1.0, power)
    drawn = model.draw(40_000, np.random.default_rng(0))
    terms, mean, covariance = _prior(small, power)
    table = np.stack([drawn[:, u, level] for u, level in terms], axis=1)
    np.testing.assert_allclose(table.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(table.T), covariance, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_outcomes_that_are_all_alike_are_no_error(small, loss):
    model = AdditiveModel(small, REFERENCE, loss, POWERS[0])
    model.learn([(0, 0, 0), (3, 1, 2)], [loss, loss])
    assert np.isfinite(model.draw(3, np.random.default_rng(0))).all()
