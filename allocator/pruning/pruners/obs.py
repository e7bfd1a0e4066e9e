"""Structured local pruner: optimal-brain-surgeon order, then an exact refit of the output projection.

Shapes: o output features, i input features of the output projection, m items of w columns each (i = m·w).
``weight_oi``, ``gram_ii``, ``mean_i``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from allocator.core.notify import Notify, silent
from allocator.pruning.calibration.factorise import factorise
from allocator.pruning.calibration.routing import Routing
from allocator.pruning.calibration.statistics import Gram, Need
from allocator.pruning.levels.compact import item_columns
from allocator.pruning.pruners.experts import expert_order
from allocator.pruning.pruners.protocol import Criterion, PrunerSpec, Refit, UnitProblem
from allocator.pruning.pruners.removal import obs_order

_NOISE = 1e-5
"""A variance below this share of the mean square is the rounding error of float32 sums over a constant."""


class Obs:
    """Order items by one greedy OBS pass, and refit the kept columns of the output projection per level.

    The pass removes the item of smallest error increase, spreads its weight over the rest and downdates the inverse
    Hessian (ZipLM, Kurtic et al., 2023; DarwinLM). Each level keeps a prefix of the order. Its columns are the
    least-squares solution W_K = (H_KK)⁻¹ G_K for the dense output (Týr-the-Pruner), in float64.

    With ``bias``, a bias restores the mean of the output that is lost, as in FLAP (An et al., AAAI 2024). FLAP leaves
    the kept columns unchanged and ranks channels by fluctuation. Here columns and bias are one least-squares fit with
    an intercept, so order and refit use the Gram matrix of the centred inputs.
    """

    name: ClassVar[str] = "obs"
    patterns: ClassVar[tuple[str, ...]] = ("structured",)
    need: ClassVar[Need] = "gram"

    def __init__(self, damping: float = 0.01, bias: bool = False, experts: Criterion | None = None) -> None:
        """Set how Hessians are damped and what is fitted.

        Args:
            damping: λ, the share of the mean of H's diagonal that is added to the diagonal.
            bias: Whether to fit an intercept.
            experts: How whole experts are chosen; None if no unit is whole experts.
        """
        self.refit = Refit(damping, bias)
        self._experts = experts

    @classmethod
    def from_spec(cls, spec: PrunerSpec) -> Obs:
        """Return the pruner with the damping, the bias and the criterion for experts of a specification."""
        return cls(spec.damping, spec.bias, spec.experts)

    def settings(self) -> Mapping[str, Any]:
        """Return damping and bias, and the criterion for experts if there is one."""
        experts = {} if self._experts is None else {"experts": self._experts}
        return {"damping": self.refit.damping, "bias": self.refit.intercept, **experts}

    def levels(self, problem: UnitProblem, notify: Notify = silent) -> dict[str, torch.Tensor]:
        """Return ``order``, ``output.<level>`` and, with ``bias``, ``bias.<level>``.

        Levels that keep all or nothing have no output projection. Whole experts have an order alone, because the
        experts that stay are unchanged. See :mod:`allocator.pruning.levels.compact`.
        """
        unit, width, statistics = problem.unit, problem.task.width, problem.statistics
        if isinstance(statistics, Routing):
            assert self._experts is not None
            least = min(count for count in unit.kept if count)
            return {"order": expert_order(statistics, self._experts, unit.num_groups, least).to(torch.int32)}
        assert isinstance(statistics, Gram)
        weight_oi, gram_ii, sum_i = (
            tensor.to("cpu", torch.float64) for tensor in (problem.weight_oi, statistics.gram_ii, statistics.sum_i)
        )
        bias = self.refit.intercept
        mean_i = sum_i / max(1, statistics.count)
        if bias:
            gram_ii = centre_gram(gram_ii, mean_i, statistics.count)
            target_o = statistics.target_o
            mean_o = weight_oi @ mean_i if target_o is None else target_o.to("cpu", torch.float64) / statistics.count
        factor = factorise(gram_ii, self.refit.damping, unit.name, notify)
        # an input that is always zero costs nothing to remove, despite its weights and its unit diagonal
        order = obs_order(weight_oi * (gram_ii.diagonal() > 0), factor.inverse(), width, unit.num_groups)
        tensors = {"order": order.to(torch.int32)}
        levels = [level for level in problem.levels if 0 < unit.kept[level] < unit.total]
        if not levels:
            return tensors
        # the kept items of every level are a prefix if the order takes one item of each group in turn
        columns = item_columns(order.view(unit.num_groups, -1).T.flatten(), width)
        counts = [unit.kept[level] * width for level in levels]
        for level, kept_ok in zip(levels, refit_columns(weight_oi, factor.gram_ii, columns, counts), strict=True):
            by_group = kept_ok.unflatten(1, (-1, unit.num_groups, width)).transpose(1, 2)
            tensors[f"output.{level}"] = by_group.flatten(1)
            if bias:
                kept = columns[: kept_ok.shape[1]]
                tensors[f"bias.{level}"] = mean_o - kept_ok @ mean_i[kept]
        return tensors


def refit_columns(
    weight_oi: torch.Tensor, gram_ii: torch.Tensor, columns: torch.Tensor, counts: Sequence[int]
) -> list[torch.Tensor]:
    """Return, for each count, the kept columns [out, count] that best reproduce the dense output.

    With H = L Lᵀ, the leading block of L is the factor of the leading block of H, and L⁻¹ H Wᵀ = Lᵀ Wᵀ holds the
    forward substitution of every level. So each level costs one back substitution.

    Args:
        weight_oi: Weight of the output projection.
        gram_ii: Damped Gram matrix of its inputs.
        columns: All columns; each level keeps a prefix of them.
        counts: How many columns each level keeps.
    """
    upper_ii = torch.linalg.cholesky(gram_ii[columns][:, columns], upper=True)
    forward_io = upper_ii @ weight_oi[:, columns].T
    return [torch.linalg.solve_triangular(upper_ii[:n, :n], forward_io[:n], upper=True).T for n in counts]


def centre_gram(gram_ii: torch.Tensor, mean_i: torch.Tensor, count: int) -> torch.Tensor:
    """Return the Gram matrix of the inputs minus their means; inputs that do not vary are exactly zero in it."""
    centred_ii = gram_ii - count * torch.outer(mean_i, mean_i)
    varies = centred_ii.diagonal() > _NOISE * gram_ii.diagonal()
    return centred_ii * (varies[:, None] & varies)
