"""Structured local pruner: optimal-brain-surgeon order, then an exact refit of the output projection.

Shapes: o output features, i input features of the output projection, m items of w columns each (i = m·w).
``weight_oi``, ``gram_ii``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from allocator.core.space import Unit
from allocator.prune.factorise import Report, factorise, silent
from allocator.prune.statistics import Gram, Need, Norms, Nothing


class Obs:
    """Order items by one greedy OBS pass, and refit the kept columns of the output projection per level.

    The pass removes the item of smallest error increase, spreads its weight over the rest and downdates the
    inverse Hessian (ZipLM, Kurtic et al., 2023; DarwinLM). Each level keeps a prefix of the order, and its
    columns are the least-squares solution W_K = (H_KK)⁻¹ G_K for the dense output (Týr-the-Pruner), in float64.
    """

    name = "obs"
    need: Need = "gram"

    def __init__(self, damping: float = 0.01) -> None:
        """Add ``damping`` times the mean of H's diagonal to that diagonal."""
        self.damping = damping

    def settings(self) -> Mapping[str, float]:
        """Return what the result depends on."""
        return {"damping": self.damping}

    def levels(
        self,
        unit: Unit,
        width: int,
        weight_oi: torch.Tensor,
        statistics: Gram | Norms | Nothing,
        wanted: Sequence[int],
        report: Report = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``order`` [items] and, for each wanted level that keeps something, ``output.<level>``."""
        assert isinstance(statistics, Gram)
        weight = weight_oi.double()
        factor = factorise(statistics.gram_ii.double(), self.damping, unit.name, report)
        # what no input reaches costs nothing to remove, whatever its weights and the diagonal that stands in
        order = obs_order(weight * (statistics.gram_ii.diagonal() > 0), factor.inverse(), width)
        tensors = {"order": order.to(torch.int32)}
        for level in wanted:
            if 0 < unit.kept[level] < unit.total:
                columns = item_columns(order[: unit.kept[level]], width)
                tensors[f"output.{level}"] = refit(weight, factor.gram_ii, columns)
        return tensors


def item_columns(items: torch.Tensor, width: int) -> torch.Tensor:
    """Return the columns of items, in the order of the items."""
    return (items[:, None] * width + torch.arange(width)).flatten()


def obs_order(weight_oi: torch.Tensor, inverse_ii: torch.Tensor, width: int) -> torch.Tensor:
    """Return item indices from the last removed to the first: any level keeps a prefix.

    With S the columns of an item, its score is Σ λ ⊙ W_S, where λ = W_S ([H⁻¹]_SS)⁻¹; removing it changes W by
    −λ H⁻¹_S: and H⁻¹ by −H⁻¹_:S ([H⁻¹]_SS)⁻¹ H⁻¹_S:.

    Args:
        weight_oi: Weight of the output projection, float64.
        inverse_ii: Inverse of the damped Gram matrix of its inputs, float64.
        width: Columns per item.
    """
    weight, inverse = weight_oi.clone(), inverse_ii
    num_items = weight.shape[1] // width
    alive = torch.ones(num_items, dtype=torch.bool)
    removed: list[int] = []
    for _ in range(num_items):
        blocks = inverse.view(num_items, width, num_items, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        remaining = alive.nonzero().flatten()
        columns = weight.view(-1, num_items, width)[:, remaining].permute(1, 0, 2)
        scores = (torch.linalg.solve(blocks[remaining], columns, left=False) * columns).sum((1, 2))
        item = int(remaining[scores.argmin()])
        removed.append(item)
        alive[item] = False
        own = slice(item * width, (item + 1) * width)
        spread = torch.linalg.solve(inverse[own, own], inverse[own])
        weight -= weight[:, own] @ spread
        inverse = inverse - inverse[:, own] @ spread
    return torch.tensor(removed[::-1])


def refit(weight_oi: torch.Tensor, gram_ii: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the kept columns [out, kept] that best reproduce the dense output, in the order of ``columns``."""
    factor = torch.linalg.cholesky(gram_ii[columns][:, columns])
    return torch.cholesky_solve(gram_ii[columns] @ weight_oi.T, factor).T
