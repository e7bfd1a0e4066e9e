"""The protocol of a model of the loss, and what such models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from allocator.core.space import Allocation

_SAMPLING = 128.0
"""Relative variance of a difference on one token, while it is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The difference of the losses of two allocations, measured on the same sequences.

    Attributes:
        allocation: The allocation.
        reference: The allocation that it is compared with.
        value: Loss of the allocation minus the loss of the reference, divided by their mean.
        tokens: Tokens of the measurement.
        error: Standard error of the value, from its spread over sequences; None if unknown.
        mean: The mean of the two losses.
    """

    allocation: Allocation
    reference: Allocation
    value: float
    tokens: int
    error: float | None
    mean: float = 1.0


class Surrogate(Protocol):
    """A model of the loss around a centre that learns from differences. U units, L levels, N allocations.

    Attributes:
        table_ul: Expected loss of each level, relative, up to a constant for each unit.
    """

    table_ul: np.ndarray

    def observe(self, difference: Difference) -> None:
        """Take a measured difference, which counts from the next :meth:`refresh` on."""
        ...

    def refresh(self, centre: Allocation) -> None:
        """Fit the model to all observations, around a new centre."""
        ...

    def predict(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return how much more allocations [N, U] lose than the centre."""
        ...

    def estimate(self, levels_nu: np.ndarray, value_n: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Weigh measured differences [N] of allocations from the centre against the expected ones.

        Returns:
            The estimated difference on all tokens, [N], and its deviation, [N].
        """
        ...

    def deviation(self) -> np.ndarray:
        """Return the deviation of each level's loss relative to the centre's, [U, L]."""
        ...

    def cautious(self) -> np.ndarray:
        """Return the table for moves that must not disappoint, [U, L]."""
        ...

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the table of a sample of the model, [U, L]."""
        ...


class Sampling:
    """The relative variance of differences on few tokens about those on all, learned from their standard errors."""

    def __init__(self, tokens: int) -> None:
        """Begin with a typical variance; ``tokens`` are those of the last fidelity."""
        self._tokens, self._variance = tokens, _SAMPLING

    def learn(self, error_n: np.ndarray, tokens_n: np.ndarray, square_n: np.ndarray) -> None:
        """Learn from standard errors of differences (NaN if unknown), their tokens, and the squares of their sizes."""
        known_n = np.isfinite(error_n)
        if known_n.any():
            self._variance = float((error_n**2 * tokens_n)[known_n].sum() / max(square_n[known_n].sum(), 1e-300))

    def beyond(self, tokens_n: np.ndarray | int) -> np.ndarray:
        """Return the relative variance of differences on so many tokens about those on all."""
        return np.asarray(np.maximum(self._variance * (1 / tokens_n - 1 / self._tokens), 0.0))


def weigh(
    value_n: np.ndarray, blur_n: np.ndarray, expected_n: np.ndarray, misfit_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Combine measurements of deviation ``blur`` with expectations of deviation ``misfit``: mean and deviation, [N].

    A measurement without blur is believed, even if the expectation is certain too.
    """
    prior_n, whole_n = np.square(misfit_n), np.square(misfit_n) + np.square(blur_n)
    share_n = np.divide(prior_n, whole_n, out=np.ones_like(whole_n), where=whole_n > 0)
    return expected_n + share_n * (value_n - expected_n), blur_n * np.sqrt(share_n)
