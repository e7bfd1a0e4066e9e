"""A check that statistics of activations are finite."""

from __future__ import annotations

import torch

from allocator.core.errors import UserError


def check_finite(values: torch.Tensor, module: str) -> None:
    """Check statistics of the inputs of a module.

    Raises:
        UserError: A value is NaN or infinite; the message names the module.
    """
    if not torch.isfinite(values).all():
        raise UserError(
            f"calibration: the inputs of {module} are not all finite. Check the weights, or use --set dtype=float32"
        )
