"""SparseGPT: a sweep along the inputs removes single weights, and later columns make up for each removal.

Shapes: i input features, b those of one block, l levels, o output rows. The sweep runs along the inputs, so they
come first: ``weight_ilo``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from allocator.core.notify import Notify, silent
from allocator.core.space import Unit
from allocator.pruning.calibration.factorise import factorise
from allocator.pruning.calibration.statistics import Gram, Need, Statistics
from allocator.pruning.levels.masks import packed

BLOCK = 128
"""Columns between two lazy updates of all later ones, and columns whose weights compete in an unstructured mask."""


class SparseGpt:
    """Remove weights of least w²/[U_jj]² and update the rest (SparseGPT, Frantar & Alistarh, ICML 2023, algorithm 1).

    U is the upper Cholesky factor of the inverse Hessian, in float64; the sweep is in float32, all levels at once.
    Levels are not nested. Of every block, an unstructured level removes its share, to the weight; an N:M level
    removes the same number from every group of a row, chosen when the sweep reaches the group.
    """

    name = "sparsegpt"
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
        statistics: Statistics,
        wanted: Sequence[int],
        notify: Notify = silent,
    ) -> dict[str, torch.Tensor]:
        """Return ``mask.<level>`` and ``values.<level>``. See ``LocalPruner``."""
        assert isinstance(statistics, Gram)
        upper_ii = inverse_factor(statistics.gram_ii.double(), self.damping, unit.name, notify)
        # what no input reaches costs nothing to remove, whatever its weights and the diagonal that stands in
        prices_i = torch.where(statistics.gram_ii.diagonal() > 0, upper_ii.diagonal().reciprocal(), 0.0)
        spread_ii = upper_ii / upper_ii.diagonal()[:, None]
        removals = [unit.total - unit.kept[level] for level in wanted]
        weight_ilo, removed_ilo = sweep(weight_oi.float(), spread_ii.float(), prices_i.float(), removals, unit.group)
        tensors = {}
        for index, level in enumerate(wanted):
            kept_oi = ~removed_ilo[:, index].T
            tensors[f"mask.{level}"] = packed(kept_oi)
            tensors[f"values.{level}"] = weight_ilo[:, index].T[kept_oi]
        return tensors


def inverse_factor(gram_ii: torch.Tensor, damping: float, name: str, notify: Notify) -> torch.Tensor:
    """Return the upper U with UᵀU = H⁻¹, H damped as it must be.

    With the inputs in reverse order H = LLᵀ, so in their own order H = RRᵀ with R upper, and U = R⁻¹: no inverse
    is formed, nor factorised.
    """
    lower_ii = factorise(gram_ii.flip(0, 1), damping, name, notify).cholesky_ii
    return torch.linalg.solve_triangular(lower_ii, torch.eye(len(lower_ii)).to(lower_ii), upper=False).flip(0, 1)


def sweep(
    weight_oi: torch.Tensor,
    spread_ii: torch.Tensor,
    prices_i: torch.Tensor,
    removals: Sequence[int],
    group: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the updated weights and what was removed, both [in, levels, out].

    A level's result does not depend, in any bit, on which other levels are swept with it.

    Args:
        weight_oi: What the levels should behave like.
        spread_ii: U with its rows divided by their diagonals: what removing a weight of one takes from later ones.
        prices_i: 1/U_jj: what removing a weight of one costs.
        removals: Weights that each level removes.
        group: Every run of so many inputs of a row loses the same number; None where weights go freely.
    """
    rows, columns = weight_oi.shape
    weight_ilo = weight_oi.T[:, None].repeat(1, len(removals), 1)
    removed_ilo = torch.zeros_like(weight_ilo, dtype=torch.bool)
    width = BLOCK if group is None else max(1, BLOCK // group) * group
    for start in range(0, columns, width):
        end = min(start + width, columns)
        if group is None:
            scores_blo = weight_ilo[start:end].abs() * prices_i[start:end, None, None]
            for index, removal in enumerate(removals):
                # rounded down as a running total, so that the last block makes the total exact
                quota = removal * end // columns - removal * start // columns
                removed_ilo[start:end, index] = _least(scores_blo[:, index], quota)
        lost_blo = torch.empty_like(weight_ilo[start:end])
        for j in range(start, end):
            if group is not None and j % group == 0:
                ranks_glo = _ranks(weight_ilo[j : j + group].abs() * prices_i[j : j + group, None, None])
                for index, removal in enumerate(removals):
                    removed_ilo[j : j + group, index] = ranks_glo[:, index] < removal * group // (rows * columns)
            lost_blo[j - start] = weight_ilo[j] * removed_ilo[j]
            weight_ilo[j + 1 : end] -= spread_ii[j, j + 1 : end, None, None] * lost_blo[j - start]
        for index in range(len(removals)):
            # level by level and in memory of its own: how a product is rounded depends on shapes and alignment
            lost_bo = lost_blo[:, index].contiguous()
            weight_ilo[end:, index] -= spread_ii[start:end, end:].T @ lost_bo
    return weight_ilo, removed_ilo


def _least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mask of the ``count`` least scores; of equal ones, the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.flatten().kthvalue(count).values
    below, equal = scores < bound, scores == bound
    return below | (equal & (equal.flatten().cumsum(0).view_as(equal) <= count - below.sum()))


def _ranks(scores_glo: torch.Tensor) -> torch.Tensor:
    """Return ranks from least to most along the first dimension; of equal scores, the first is less."""
    return scores_glo.argsort(dim=0, stable=True).argsort(dim=0)
