"""Structured local pruner: optimal-brain-surgeon order, then an exact refit of the output projection.

Shapes: o output features, i input features of the output projection, m items of w columns each (i = m·w).
``weight_oi``, ``gram_ii``, ``mean_i``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from allocator.core.notify import Notify, silent
from allocator.core.space import Unit
from allocator.pruning.calibration.factorise import factorise
from allocator.pruning.calibration.routing import Routing
from allocator.pruning.calibration.statistics import Gram, Need, Statistics
from allocator.pruning.pruners.experts import Criterion, expert_order
from allocator.pruning.pruners.removal import obs_order

_NOISE = 1e-5
"""A variance below this share of the mean square is what fp32 sums leave of a constant."""


class Obs:
    """Order items by one greedy OBS pass, and refit the kept columns of the output projection per level.

    The pass removes the item of smallest error increase, spreads its weight over the rest and downdates the
    inverse Hessian (ZipLM, Kurtic et al., 2023; DarwinLM). Each level keeps a prefix of the order, and its
    columns are the least-squares solution W_K = (H_KK)⁻¹ G_K for the dense output (Týr-the-Pruner), in float64.

    With ``bias``, the mean output of what is lost comes back as a bias, as in FLAP (An et al., AAAI 2024). FLAP
    leaves the kept columns as they are and ranks channels by fluctuation; here columns and bias are one
    least-squares fit with an intercept, so order and refit work on the Gram matrix of the centred inputs.
    """

    name = "obs"
    need: Need = "gram"

    def __init__(self, damping: float = 0.01, bias: bool = False, experts: Criterion | None = None) -> None:
        """Add ``damping`` times the mean of H's diagonal to that diagonal.

        Args:
            damping: λ.
            bias: Fit an intercept.
            experts: How whole experts are chosen, where there are any.
        """
        self.damping, self.bias, self.experts = damping, bias, experts

    def settings(self) -> Mapping[str, Any]:
        """Return what the result depends on."""
        chosen = {} if self.experts is None else {"experts": self.experts}
        return {"damping": self.damping, "bias": self.bias, **chosen}

    def levels(
        self,
        unit: Unit,
        width: int,
        weight_oi: torch.Tensor,
        statistics: Statistics,
        wanted: Sequence[int],
        notify: Notify = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``order`` [items] and, for each wanted level that keeps something, ``output.<level>``.

        With ``bias`` also ``bias.<level>`` [out], what is to be added to the output projection's bias. Whole experts
        have an order alone: those that stay are as they were.
        """
        if isinstance(statistics, Routing):
            assert self.experts is not None
            least = min(count for count in unit.kept if count)
            return {"order": expert_order(statistics, self.experts, unit.num_groups, least).to(torch.int32)}
        assert isinstance(statistics, Gram)
        weight_oi, gram_ii, sum_i = (
            tensor.to("cpu", torch.float64) for tensor in (weight_oi, statistics.gram_ii, statistics.sum_i)
        )
        mean_i = sum_i / max(1, statistics.count)
        if self.bias:
            gram_ii = centred(gram_ii, mean_i, statistics.count)
            aim_o = statistics.target_o
            mean_o = weight_oi @ mean_i if aim_o is None else aim_o.to("cpu", torch.float64) / statistics.count
        factor = factorise(gram_ii, self.damping, unit.name, notify)
        # what no input reaches costs nothing to remove, whatever its weights and the diagonal that stands in
        order = obs_order(weight_oi * (gram_ii.diagonal() > 0), factor.inverse(), width, unit.num_groups)
        tensors = {"order": order.to(torch.int32)}
        refitted = [level for level in wanted if 0 < unit.kept[level] < unit.total]
        if not refitted:
            return tensors
        # kept items of every level are a prefix when each group's last come first
        columns = item_columns(order.view(unit.num_groups, -1).T.flatten(), width)
        counts = [unit.kept[level] * width for level in refitted]
        for level, kept_ok in zip(refitted, refits(weight_oi, factor.gram_ii, columns, counts), strict=True):
            by_group = kept_ok.unflatten(1, (-1, unit.num_groups, width)).transpose(1, 2)
            tensors[f"output.{level}"] = by_group.flatten(1)
            if self.bias:
                kept = columns[: kept_ok.shape[1]]
                tensors[f"bias.{level}"] = mean_o - kept_ok @ mean_i[kept]
        return tensors


def item_columns(items: torch.Tensor, width: int) -> torch.Tensor:
    """Return the columns of items, in the order of the items."""
    return (items[:, None] * width + torch.arange(width)).flatten()


def refits(
    weight_oi: torch.Tensor, gram_ii: torch.Tensor, columns: torch.Tensor, counts: Sequence[int]
) -> list[torch.Tensor]:
    """Return, for each count, the kept columns [out, count] that best reproduce the dense output.

    With H = L Lᵀ, the leading block of L is the factor of the leading block of H, and L⁻¹ H Wᵀ = Lᵀ Wᵀ holds the
    forward substitution of every level. So each costs one back substitution.

    Args:
        weight_oi: Weight of the output projection.
        gram_ii: Damped Gram matrix of its inputs.
        columns: All columns; each level keeps a prefix of them.
        counts: How many columns each level keeps.
    """
    upper_ii = torch.linalg.cholesky(gram_ii[columns][:, columns], upper=True)
    forward_io = upper_ii @ weight_oi[:, columns].T
    return [torch.linalg.solve_triangular(upper_ii[:n, :n], forward_io[:n], upper=True).T for n in counts]


def centred(gram_ii: torch.Tensor, mean_i: torch.Tensor, count: int) -> torch.Tensor:
    """Return the Gram matrix of the inputs less their means; inputs that do not vary are exactly zero in it."""
    centred_ii = gram_ii - count * torch.outer(mean_i, mean_i)
    varies = centred_ii.diagonal() > _NOISE * gram_ii.diagonal()
    return centred_ii * (varies[:, None] & varies)
