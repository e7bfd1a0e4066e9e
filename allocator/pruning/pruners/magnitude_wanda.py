"""Pruners of single weights that rank them once: magnitude, and Wanda.

Their levels are nested, so that one number per weight is kept: the first level that removes it. The weights of an N:M
unit compete within their group. Those of an unstructured unit compete within the whole matrix in magnitude pruning,
and within their output row in Wanda. Both remove the same number of weights.

Shapes: o output rows, i input features. ``weight_oi``, ``removed_at_oi``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from allocator.core.notify import Notify, silent
from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import Need, Norms
from allocator.pruning.levels.compact import NEVER
from allocator.pruning.pruners.protocol import PrunerSpec, Refit, UnitProblem


class Magnitude:
    """Remove the weights of smallest absolute value in the matrix, or in each group."""

    name: ClassVar[str] = "magnitude"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "n:m")
    need: ClassVar[Need] = "nothing"
    refit: ClassVar[Refit | None] = None

    @classmethod
    def from_spec(cls, spec: PrunerSpec) -> Magnitude:
        """Return the pruner; it has no settings."""
        return cls()

    def settings(self) -> Mapping[str, float]:
        """Return no settings."""
        return {}

    def levels(self, problem: UnitProblem, notify: Notify = silent) -> dict[str, torch.Tensor]:
        """Return ``removed_at``; see :mod:`allocator.pruning.levels.compact`."""
        unit = problem.unit
        return {"removed_at": _rank_removals(unit, problem.weight_oi.abs(), unit.group or unit.total)}


class Wanda:
    """Remove the weights of smallest |W_ij|·‖X_j‖₂ within each output row, or group (Sun et al., ICLR 2024)."""

    name: ClassVar[str] = "wanda"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "n:m")
    need: ClassVar[Need] = "norms"
    refit: ClassVar[Refit | None] = None

    @classmethod
    def from_spec(cls, spec: PrunerSpec) -> Wanda:
        """Return the pruner; it has no settings."""
        return cls()

    def settings(self) -> Mapping[str, float]:
        """Return no settings."""
        return {}

    def levels(self, problem: UnitProblem, notify: Notify = silent) -> dict[str, torch.Tensor]:
        """Return ``removed_at``; see :mod:`allocator.pruning.levels.compact`."""
        unit, statistics = problem.unit, problem.statistics
        assert isinstance(statistics, Norms)
        scores_oi = problem.weight_oi.float().abs() * statistics.square_i.sqrt()
        return {"removed_at": _rank_removals(unit, scores_oi, unit.group or scores_oi.shape[1])}


def _rank_removals(unit: Unit, scores_oi: torch.Tensor, size: int) -> torch.Tensor:
    """Return the first level that removes each weight, [out, in], uint8.

    Args:
        unit: The matrix with its ladder.
        scores_oi: Weights of low score are removed first.
        size: Number of consecutive weights that compete.
    """
    scores = scores_oi.reshape(-1, size)
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    removed_at = torch.full_like(ranks, NEVER, dtype=torch.uint8)
    for level in reversed(range(1, unit.num_levels)):
        removed_at[ranks < (unit.total - unit.kept[level]) // len(scores)] = level
    return removed_at.view_as(scores_oi)
