"""A local pruner of your own: weights by their relative importance in their row and column (RIA, Zhang et al., 2024).

Run it with ``python examples/own_pruner.py``. It needs no change of the package.
"""

from collections.abc import Mapping
from typing import Any

import torch

import allocator
from allocator.core.notify import Notify, silent
from allocator.pruning.levels.compact import NEVER, CompactLevels
from allocator.pruning.pruners.protocol import UnitProblem


class Ria:
    """Scores |W_ij| / Σ_j |W_ij| + |W_ij| / Σ_i |W_ij|, times ‖X_j‖^a. It keeps the values of kept weights."""

    name = "ria"
    patterns = ("unstructured",)
    need = "norms"  # Statistics of the inputs: the sum of squares of every feature.
    refit = None  # It chooses no new values.

    def __init__(self, power: float = 0.5) -> None:
        self.power = power

    def settings(self) -> Mapping[str, Any]:
        """Return what a plan records."""
        return {"power": self.power}

    def levels(self, problem: UnitProblem, notify: Notify = silent) -> CompactLevels:
        """Return ``removed_at`` [out, in]: the first level that removes each weight."""
        size_oi = problem.weight_oi.float().abs()
        row_o1, column_i = size_oi.sum(1, keepdim=True).clamp_min(1e-12), size_oi.sum(0).clamp_min(1e-12)
        importance_oi = size_oi / row_o1 + size_oi / column_i
        score_oi = importance_oi * problem.statistics.square_i.float().sqrt() ** self.power  # ‖X_j‖^a
        order = score_oi.flatten().argsort(stable=True)
        removed_at = torch.full((order.numel(),), NEVER, dtype=torch.uint8)
        kept = problem.unit.kept
        for level in range(1, len(kept)):
            removed_at[order[kept[0] - kept[level - 1] : kept[0] - kept[level]]] = level
        return {"removed_at": removed_at.view(size_oi.shape)}


if __name__ == "__main__":
    small = ["tokens.calibration=2048", "tokens.selection=512", "tokens.test=512"]
    result = allocator.search(
        target=0.5,
        pattern="unstructured",
        pruner=Ria(),
        method="evolution",
        budget="30 evaluations",
        workers=0,
        name="own-pruner",
        settings=[*small, "search.evolution.tokens=[512,1024]"],
    )
    print(result.figures["uniform"]["kl"], result.figures["searched"]["kl"])
