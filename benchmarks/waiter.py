"""A worker that waits in place of computing, for `scaling.py`. It imports no torch, so that many fit on one machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from allocator.core.protocols import Outcome, Request

TOKENS = 4096
"""Tokens of which the measurement takes the mean time."""


class Waiter:
    """Takes a time for each allocation that is drawn anew whenever it is measured: log-normal, and now and then long.

    Args:
        mean_s: Mean time on all tokens, stragglers apart.
        spread: Standard deviation of the logarithm.
        stragglers: Share of measurements that take twenty times as long.
    """

    SLOWER = 20.0

    def __init__(self, mean_s: float, spread: float, stragglers: float) -> None:
        self._mean_s, self._spread, self._stragglers = mean_s, spread, stragglers
        self._rng = np.random.default_rng()

    def ready(self) -> str:
        """Return what hardware this is."""
        return "waiter"

    def renew(self, stragglers: float) -> None:
        """Go on with another share of stragglers."""
        self._stragglers = stragglers

    def measure(self, requests: Sequence[Request]) -> list[Outcome]:
        """Wait, and return losses that are a function of the allocation."""
        outcomes = []
        for request in requests:
            wait_s = (
                self._mean_s
                * request.tokens
                / TOKENS
                * float(self._rng.lognormal(-(self._spread**2) / 2, self._spread))
            )
            wait_s *= self.SLOWER if self._rng.random() < self._stragglers else 1.0
            time.sleep(wait_s)
            levels = np.array(request.allocation, dtype=float)
            loss = float((levels**2 * (1 + np.arange(len(levels)) % 5)).sum()) / len(levels)
            outcomes.append(
                Outcome(
                    request=request,
                    measured={"kl": loss, "nll": 2.0 + loss},
                    wall_s=wait_s,
                    loss_name="kl",
                    sequence_losses=(loss,) * 8,
                )
            )
        return outcomes
