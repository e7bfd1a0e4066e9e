"""Pruners of single weights that rank them once: magnitude, and Wanda.

Their levels are nested: what is stored is, for every weight, the first level that removes it. Weights compete
within the groups of an N:M unit; where they go freely, within their output row in Wanda, and within the whole
matrix in magnitude pruning. The totals are the same.

Shapes: o output rows, i input features. ``weight_oi``, ``removed_at_oi``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from allocator.core.notify import Notify, silent
from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import Need, Norms, Statistics

NEVER = 255
"""Stands in ``removed_at`` for a weight that every level keeps."""


class Magnitude:
    """Remove the weights of smallest absolute value in the matrix, or in each group."""

    name = "magnitude"
    need: Need = "nothing"

    def settings(self) -> Mapping[str, float]:
        """Return what the result depends on."""
        return {}

    def levels(
        self,
        unit: Unit,
        width: int,
        weight_oi: torch.Tensor,
        statistics: Statistics,
        wanted: Sequence[int],
        notify: Notify = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``removed_at`` [out, in], uint8. See :class:`~allocator.pruning.pruners.registry.LocalPruner`."""
        return {"removed_at": _first_level(unit, weight_oi.abs(), unit.group or unit.total)}


class Wanda:
    """Remove the weights of smallest |W_ij|·‖X_j‖₂ within each output row, or group (Sun et al., ICLR 2024)."""

    name = "wanda"
    need: Need = "norms"

    def settings(self) -> Mapping[str, float]:
        """Return what the result depends on."""
        return {}

    def levels(
        self,
        unit: Unit,
        width: int,
        weight_oi: torch.Tensor,
        statistics: Statistics,
        wanted: Sequence[int],
        notify: Notify = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``removed_at`` [out, in], uint8. See :class:`~allocator.pruning.pruners.registry.LocalPruner`."""
        assert isinstance(statistics, Norms)
        scores_oi = weight_oi.float().abs() * statistics.square_i.sqrt()
        return {"removed_at": _first_level(unit, scores_oi, unit.group or weight_oi.shape[1])}


def _first_level(unit: Unit, scores_oi: torch.Tensor, run: int) -> torch.Tensor:
    """Return the first level that removes each weight, where every ``run`` weights in a row compete."""
    scores = scores_oi.reshape(-1, run)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    removed_at = torch.full_like(ranks, NEVER, dtype=torch.uint8)
    for level in reversed(range(1, unit.num_levels)):
        removed_at[ranks < (unit.total - unit.kept[level]) // len(scores)] = level
    return removed_at.view_as(scores_oi)
