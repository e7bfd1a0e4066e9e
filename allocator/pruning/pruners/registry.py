"""The local pruners by name, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from allocator.core.errors import UserError
from allocator.core.notify import Notify, silent
from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import Need, Statistics
from allocator.pruning.pruners.experts import Criterion
from allocator.pruning.pruners.magnitude_wanda import Magnitude, Wanda
from allocator.pruning.pruners.obs import Obs
from allocator.pruning.pruners.sparsegpt import SparseGpt

PRUNERS: Mapping[str, tuple[str, ...]] = {
    "structured": ("obs",),
    "unstructured": ("sparsegpt", "wanda", "magnitude"),
    "n:m": ("sparsegpt", "wanda", "magnitude"),
}
"""Names of the pruners that serve each pattern, the default first."""


class LocalPruner(Protocol):
    """Prunes one unit at every level, from its weight and statistics of its inputs.

    What it returns is compact, in one of three forms:

    - structured: ``order`` [items], the items from the last removed to the first, so that a level keeps a prefix
      (of every group's part of the order, where the unit has groups); ``output.<level>`` [out, kept columns], the
      refitted output projection, its columns in that order, but for whole experts; perhaps ``bias.<level>`` [out];
    - nested masks: ``removed_at`` [out, in], uint8, the first level that removes each weight;
    - masks with values: ``mask.<level>``, uint8, the kept positions packed eight to a byte in row-major order,
      the lowest bit first, and ``values.<level>``, the kept values in that order.
    """

    name: str
    need: Need

    def settings(self) -> Mapping[str, Any]:
        """Return what the result depends on, for manifests and plans."""
        ...

    def levels(
        self,
        unit: Unit,
        width: int,
        weight_oi: torch.Tensor,
        statistics: Statistics,
        wanted: Sequence[int],
        notify: Notify = silent,
    ) -> dict[str, torch.Tensor]:
        """Return compact tensors from which levels are assembled; floating ones in any precision.

        Args:
            unit: The unit with its ladder.
            width: Columns of the output projection per item; 1 for a matrix.
            weight_oi: The unit's matrix, or its output projection: what the level should behave like.
            statistics: Of the inputs of that matrix, as :attr:`need` asks.
            wanted: Levels that will be assembled.
            notify: Hears of damping beyond the setting.
        """
        ...


def make_pruner(
    name: str, pattern: str, damping: float, bias: bool = False, experts: Criterion | None = None
) -> LocalPruner:
    """Return the pruner of a name.

    Args:
        name: One of :data:`PRUNERS`.
        pattern: What it removes.
        damping: See :class:`~allocator.pruning.pruners.obs.Obs`.
        bias: Likewise.
        experts: Likewise.

    Raises:
        UserError: There is none of that name for the pattern, or it cannot fit a bias.
    """
    if name not in PRUNERS[pattern]:
        raise UserError(
            f"pruner.name: {name!r} does not serve {pattern} pruning; these do: {', '.join(PRUNERS[pattern])}"
        )
    if bias and pattern != "structured":
        raise UserError(f"pruner.bias: {name} fits no bias; structured pruning does. Leave it out")
    if name == "obs":
        return Obs(damping, bias, experts)
    if name == "sparsegpt":
        return SparseGpt(damping)
    return Wanda() if name == "wanda" else Magnitude()
