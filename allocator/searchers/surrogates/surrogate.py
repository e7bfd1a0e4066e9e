"""What the searches that learn ask of a model of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from allocator.core.space import Allocation

_SAMPLING = 128.0
"""Relative variance of a difference on one token, where it is not known."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more one allocation loses than another, measured on the same sequences.

    Attributes:
        allocation: The one.
        reference: The other.
        value: Difference of the loss, relative to the mean of the two.
        tokens: On how many tokens.
        error: Standard error of the value, from its spread over sequences; None where it is not known.
        mean: The mean of the two.
    """

    allocation: Allocation
    reference: Allocation
    value: float
    tokens: int
    error: float | None
    mean: float = 1.0


class Surrogate(Protocol):
    """A model of the loss around a centre, which learns from differences. U units, L levels, N allocations.

    Attributes:
        table_ul: Expected loss of each level, relative, up to a constant for each unit.
    """

    table_ul: np.ndarray

    def observe(self, difference: Difference) -> None:
        """Take a measured difference; it counts from the next :meth:`refresh` on."""
        ...

    def refresh(self, centre: Allocation) -> None:
        """Fit the model to all observations, around where the search is now."""
        ...

    def predict(self, levels_nu: np.ndarray) -> np.ndarray:
        """Return how much more allocations [N, U] lose than the centre."""
        ...

    def estimate(self, levels_nu: np.ndarray, value_n: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Weigh differences [N] of allocations from the centre, measured on some tokens, against what is expected.

        Returns:
            What is to be thought of the difference on all tokens, [N], and its deviation, [N].
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
    """How differences on few tokens vary about those on all, relative to their size; learned from their errors."""

    def __init__(self, tokens: int) -> None:
        """Begin with a typical variance; ``tokens`` are all."""
        self._tokens, self._variance = tokens, _SAMPLING

    def learn(self, error_n: np.ndarray, tokens_n: np.ndarray, square_n: np.ndarray) -> None:
        """Pool the standard errors of differences, NaN where they are not known, on some tokens, of a squared size."""
        known_n = np.isfinite(error_n)
        if known_n.any():
            self._variance = float((error_n**2 * tokens_n)[known_n].sum() / max(square_n[known_n].sum(), 1e-300))

    def beyond(self, tokens_n: np.ndarray | int) -> np.ndarray:
        """Return the relative variance of differences on so many tokens, about those on all."""
        return np.asarray(np.maximum(self._variance * (1 / tokens_n - 1 / self._tokens), 0.0))


def weighed(
    value_n: np.ndarray, blur_n: np.ndarray, expected_n: np.ndarray, misfit_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation, [N], of what was measured with a blur and is expected with a misfit.

    What was measured without blur is believed, also where nothing else could have been expected.
    """
    prior_n, whole_n = np.square(misfit_n), np.square(misfit_n) + np.square(blur_n)
    share_n = np.divide(prior_n, whole_n, out=np.ones_like(whole_n), where=whole_n > 0)
    return expected_n + share_n * (value_n - expected_n), blur_n * np.sqrt(share_n)
