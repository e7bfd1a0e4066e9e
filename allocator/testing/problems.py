"""Problems for local pruners, made in one call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import Statistics
from allocator.pruning.pruners.protocol import UnitProblem, UnitTask


def unit_problem(
    unit: Unit, weight_oi: torch.Tensor, statistics: Statistics, levels: Iterable[int] | None = None, width: int = 1
) -> UnitProblem:
    """Return the problem of a unit whose matrix has its name; all levels beyond the dense one by default."""
    made = range(1, unit.num_levels) if levels is None else levels
    return UnitProblem(
        task=UnitTask(unit, unit.name, width),
        weight_oi=weight_oi,
        statistics=statistics,
        levels=tuple(made),
        dtype=weight_oi.dtype,
    )
