"""Damping and Cholesky factors of Hessians. A failed factorisation is repeated with more damping, and reported.

Shapes: i input features. ``gram_ii``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from allocator.core.errors import UserError
from allocator.core.notify import Notify

_STEPS = 8
_GROWTH = 10.0


@dataclass(frozen=True, slots=True)
class Factor:
    """A damped Hessian, which is positive definite, and its Cholesky factor.

    Attributes:
        gram_ii: H + λ·mean(diag H)·I.
        cholesky_ii: Its lower Cholesky factor.
        damping: λ, perhaps more than was set.
    """

    gram_ii: torch.Tensor
    cholesky_ii: torch.Tensor
    damping: float

    def inverse(self) -> torch.Tensor:
        """Return the inverse of the damped Hessian."""
        return torch.cholesky_inverse(self.cholesky_ii)


def damp(gram_ii: torch.Tensor, damping: float) -> torch.Tensor:
    """Return H + λ·mean(diag H)·I. Inputs that are always zero get a unit diagonal, as in SparseGPT."""
    diagonal = gram_ii.diagonal()
    added = torch.full_like(diagonal, damping * float(diagonal.mean()))
    added[diagonal == 0] = 1.0
    return gram_ii + torch.diag(added)


def factorise(gram_ii: torch.Tensor, damping: float, name: str, notify: Notify) -> Factor:
    """Damp and factorise a Hessian, with ten times the damping after every failure.

    Args:
        gram_ii: H, in the data type of the result.
        damping: λ to begin with.
        name: The unit, for messages.
        notify: Called with a message for every increase of the damping.

    Raises:
        UserError: Even the greatest damping fails.
    """
    for step in range(_STEPS):
        matrix = damp(gram_ii, damping)
        cholesky, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and torch.isfinite(cholesky).all():
            return Factor(matrix, cholesky, damping)
        if step + 1 < _STEPS:
            more = damping * _GROWTH
            notify(f"{name}: the Hessian is not positive definite with damping {damping:g}; trying {more:g}")
            damping = more
    raise UserError(
        f"{name}: the Hessian of its inputs cannot be factorised, even with damping {damping:g}. "
        "Use more calibration text with --set tokens.calibration=65536"
    )
