"""SparseGPT: a sweep along the inputs removes single weights, and later columns compensate for each removal.

Shapes: i input features, b those of one block, l levels, o output rows. The sweep runs along the inputs, so they
come first: ``weight_ilo``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from allocator.core.notify import Notify, silent
from allocator.pruning.calibration.factorise import factorise
from allocator.pruning.calibration.statistics import Gram, Need
from allocator.pruning.levels.masks import pack_mask
from allocator.pruning.pruners.protocol import PrunerSpec, Refit, UnitProblem

BLOCK = 128
"""Columns between two lazy updates of all later columns. In an unstructured mask, the weights of a block compete."""


class SparseGpt:
    """Remove weights of least w²/[U_jj]² and update the rest (SparseGPT, Frantar & Alistarh, ICML 2023, algorithm 1).

    U is the upper Cholesky factor of the inverse Hessian, in float64; the sweep is in float32, all levels at once.
    Levels are not nested. An unstructured level removes its share of every block, to the weight. An N:M level removes
    the same number from every group of a row, chosen when the sweep reaches the group.
    """

    name: ClassVar[str] = "sparsegpt"
    patterns: ClassVar[tuple[str, ...]] = ("unstructured", "n:m")
    need: ClassVar[Need] = "gram"

    def __init__(self, damping: float = 0.01) -> None:
        """Set λ, the share of the mean of H's diagonal that is added to the diagonal."""
        self.refit = Refit(damping)

    @classmethod
    def from_spec(cls, spec: PrunerSpec) -> SparseGpt:
        """Return the pruner with the damping of a specification."""
        return cls(spec.damping)

    def settings(self) -> Mapping[str, float]:
        """Return the damping."""
        return {"damping": self.refit.damping}

    def levels(self, problem: UnitProblem, notify: Notify = silent) -> dict[str, torch.Tensor]:
        """Return ``mask.<level>`` and ``values.<level>``; see :mod:`allocator.pruning.levels.compact`."""
        unit, statistics = problem.unit, problem.statistics
        assert isinstance(statistics, Gram)
        upper_ii = inverse_factor(statistics.gram_ii.double(), self.refit.damping, unit.name, notify)
        # an input that is always zero costs nothing to remove, despite its weights and its unit diagonal
        costs_i = torch.where(statistics.gram_ii.diagonal() > 0, upper_ii.diagonal().reciprocal(), 0.0)
        spread_ii = upper_ii / upper_ii.diagonal()[:, None]
        removals = [unit.total - unit.kept[level] for level in problem.levels]
        weight_ilo, removed_ilo = sweep(
            problem.weight_oi.float(), spread_ii.float(), costs_i.float(), removals, unit.group
        )
        tensors = {}
        for index, level in enumerate(problem.levels):
            kept_oi = ~removed_ilo[:, index].T
            tensors[f"mask.{level}"] = pack_mask(kept_oi)
            tensors[f"values.{level}"] = weight_ilo[:, index].T[kept_oi]
        return tensors


def inverse_factor(gram_ii: torch.Tensor, damping: float, name: str, notify: Notify) -> torch.Tensor:
    """Return the upper triangular U with UᵀU = H⁻¹, where H is damped until it can be factorised.

    With the inputs in reverse order H = LLᵀ. In their own order H = RRᵀ with R upper triangular, and U = R⁻¹. So no
    inverse of H is formed or factorised.

    Args:
        gram_ii: H, in the data type of the result.
        damping: λ to begin with.
        name: The unit, for messages.
        notify: Called with a message for every increase of the damping.
    """
    lower_ii = factorise(gram_ii.flip(0, 1), damping, name, notify).cholesky_ii
    return torch.linalg.solve_triangular(lower_ii, torch.eye(len(lower_ii)).to(lower_ii), upper=False).flip(0, 1)


def sweep(
    weight_oi: torch.Tensor,
    spread_ii: torch.Tensor,
    costs_i: torch.Tensor,
    removals: Sequence[int],
    group: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the updated weights and what was removed, both [in, levels, out].

    The result of a level is the same in every bit, no matter which other levels are swept with it.

    Args:
        weight_oi: The weight whose outputs the levels reproduce.
        spread_ii: U with each row divided by its diagonal: what removing a weight of 1 subtracts from later weights.
        costs_i: 1/U_jj: the cost of removing a weight of 1.
        removals: Number of weights that each level removes.
        group: Number of consecutive inputs of a row that lose the same number of weights; None if unstructured.
    """
    rows, columns = weight_oi.shape
    weight_ilo = weight_oi.T[:, None].repeat(1, len(removals), 1)
    removed_ilo = torch.zeros_like(weight_ilo, dtype=torch.bool)
    width = BLOCK if group is None else max(1, BLOCK // group) * group
    for start in range(0, columns, width):
        end = min(start + width, columns)
        if group is None:
            scores_blo = weight_ilo[start:end].abs() * costs_i[start:end, None, None]
            for index, removal in enumerate(removals):
                # the running total is rounded down, so that the last block makes the total exact
                quota = removal * end // columns - removal * start // columns
                removed_ilo[start:end, index] = _mask_least(scores_blo[:, index], quota)
        lost_blo = torch.empty_like(weight_ilo[start:end])
        for j in range(start, end):
            if group is not None and j % group == 0:
                ranks_glo = _rank(weight_ilo[j : j + group].abs() * costs_i[j : j + group, None, None])
                for index, removal in enumerate(removals):
                    removed_ilo[j : j + group, index] = ranks_glo[:, index] < removal * group // (rows * columns)
            lost_blo[j - start] = weight_ilo[j] * removed_ilo[j]
            weight_ilo[j + 1 : end] -= spread_ii[j, j + 1 : end, None, None] * lost_blo[j - start]
        for index in range(len(removals)):
            # each level alone and in its own memory, because a product's rounding depends on shapes and alignment
            lost_bo = lost_blo[:, index].contiguous()
            weight_ilo[end:, index] -= spread_ii[start:end, end:].T @ lost_bo
    return weight_ilo, removed_ilo


def _mask_least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mask of the ``count`` least scores; ties are broken by position."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.flatten().kthvalue(count).values
    below, equal = scores < bound, scores == bound
    return below | (equal & (equal.flatten().cumsum(0).view_as(equal) <= count - below.sum()))


def _rank(scores_glo: torch.Tensor) -> torch.Tensor:
    """Return ranks from least to most along the first dimension; ties are broken by position."""
    return scores_glo.argsort(dim=0, stable=True).argsort(dim=0)
