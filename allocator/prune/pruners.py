"""The local pruners by name, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from allocator.core.errors import UserError
from allocator.core.space import Unit
from allocator.prune.statistics import Gram, Need, Norms, Nothing
from allocator.prune.structured import Obs
from allocator.prune.unstructured import Magnitude, Wanda

PRUNERS: Mapping[str, tuple[str, ...]] = {"structured": ("obs",), "unstructured": ("wanda", "magnitude")}
"""Names of the pruners that serve each pattern, the default first."""


class LocalPruner(Protocol):
    """Prunes one unit at every level, from its weight and statistics of its inputs."""

    name: str
    need: Need

    def settings(self) -> Mapping[str, float]:
        """Return what the result depends on, for manifests and plans."""
        ...

    def levels(
        self, unit: Unit, width: int, weight_oi: torch.Tensor, statistics: Gram | Norms | Nothing, wanted: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Return compact tensors from which levels are assembled.

        Args:
            unit: The unit with its ladder.
            width: Columns of the output projection per item; 1 for a matrix.
            weight_oi: The unit's matrix, or its output projection, in the checkpoint's data type.
            statistics: Of the inputs of that matrix, as :attr:`need` asks.
            wanted: Levels that will be assembled.
        """
        ...


def make_pruner(name: str, pattern: str, damping: float) -> LocalPruner:
    """Return the pruner of a name.

    Raises:
        UserError: There is none of that name for the pattern.
    """
    if name not in PRUNERS[pattern]:
        raise UserError(
            f"pruner.name: {name!r} does not serve {pattern} pruning; these do: {', '.join(PRUNERS[pattern])}"
        )
    if name == "obs":
        return Obs(damping)
    return Wanda() if name == "wanda" else Magnitude()
