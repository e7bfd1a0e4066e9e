"""Unstructured local pruners: magnitude, and Wanda.

Both rank the weights of a matrix once, so their levels are nested: what is stored is, for every weight, the
first level that removes it. Every level removes the same number of weights from each output row in Wanda, and
from the whole matrix in magnitude pruning; the totals are the same.

Shapes: o output rows, i input features. ``weight_oi``, ``removed_at_oi``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from allocator.core.space import Unit
from allocator.prune.factorise import Report, silent
from allocator.prune.statistics import Gram, Need, Norms, Nothing

NEVER = 255
"""Stands in ``removed_at`` for a weight that every level keeps."""


class Magnitude:
    """Remove the weights of smallest absolute value in the matrix."""

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
        statistics: Gram | Norms | Nothing,
        wanted: Sequence[int],
        report: Report = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``removed_at`` [out, in], uint8. See :class:`~allocator.prune.pruners.LocalPruner`."""
        ranks = weight_oi.abs().flatten().argsort(stable=True).argsort()
        return {"removed_at": _first_level(unit, ranks.view(1, -1)).view_as(weight_oi)}


class Wanda:
    """Remove the weights of smallest |W_ij|·‖X_j‖₂ within each output row (Sun et al., ICLR 2024)."""

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
        statistics: Gram | Norms | Nothing,
        wanted: Sequence[int],
        report: Report = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``removed_at`` [out, in], uint8. See :class:`~allocator.prune.pruners.LocalPruner`."""
        assert isinstance(statistics, Norms)
        scores_oi = weight_oi.float().abs() * statistics.square_i.sqrt()
        ranks_oi = scores_oi.argsort(dim=1, stable=True).argsort(dim=1)
        return {"removed_at": _first_level(unit, ranks_oi)}


def _first_level(unit: Unit, ranks: torch.Tensor) -> torch.Tensor:
    """Return the first level that removes each weight, given ranks from least to most important per row."""
    rows = ranks.shape[0]
    removed_at = torch.full_like(ranks, NEVER, dtype=torch.uint8)
    for level in reversed(range(1, unit.num_levels)):
        removed_at[ranks < (unit.total - unit.kept[level]) // rows] = level
    return removed_at
