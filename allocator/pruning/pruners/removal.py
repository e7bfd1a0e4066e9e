"""The greedy optimal-brain-surgeon pass: the order in which the items of a unit are removed.

Shapes: o output features, i input features of the output projection, m items of w columns each (i = m·w), p columns
removed since the last update. ``weight_oi``, ``inverse_ii``, ``spread_pi``, ``blocks_mww``.
"""

from __future__ import annotations

import torch

# columns that a batch removes, and its least number of items; measured speed hardly changes around these values
_COLUMNS = 64
_ITEMS = 4


def obs_order(
    weight_oi: torch.Tensor, inverse_ii: torch.Tensor, width: int, num_groups: int = 1, batch: int | None = None
) -> torch.Tensor:
    """Return item indices from the last removed to the first, one group after the other.

    With S the columns of an item, its score is tr(([H⁻¹]_SS)⁻¹ C_SS), where C = WᵀW; removing it changes W by
    −W_S ([H⁻¹]_SS)⁻¹ H⁻¹_S: and H⁻¹ by −H⁻¹_:S ([H⁻¹]_SS)⁻¹ H⁻¹_S: (ZipLM, Kurtic et al., 2023). Scores need only C,
    so W is never updated: with L Lᵀ = [H⁻¹]_SS and U = L⁻¹ H⁻¹_S:, H⁻¹ loses UᵀU and C loses VᵀU + UᵀV, where
    V = L⁻¹ C_S: − ½ L⁻¹ C_SS L⁻ᵀ U.

    Within a batch of removals, only the diagonal blocks, which give the scores, and the rows of the removed item are
    updated, as in blocked factorisations. At the end of the batch, one product updates the remaining columns.

    Args:
        weight_oi: Weight of the output projection, float64.
        inverse_ii: Inverse of the damped Gram matrix of its inputs, float64.
        width: Columns per item.
        num_groups: Number of groups of equally many consecutive items. In each round, every group loses one item.
        batch: Number of items removed between two updates. The order does not depend on it.
    """
    inverse, square = inverse_ii, weight_oi.T @ weight_oi
    items = torch.arange(len(inverse) // width)
    per_group = len(items) // num_groups
    removed: list[list[int]] = [[] for _ in range(num_groups)]
    waiting = torch.ones(num_groups, dtype=torch.bool)
    while len(items):
        steps = min(batch or max(_ITEMS, _COLUMNS // width), len(items))
        groups, alive = items // per_group, torch.ones(len(items), dtype=torch.bool)
        inverse_mww, square_mww = _diagonal(inverse, width), _diagonal(square, width)
        spread_pi, change_pi = inverse.new_empty(2, steps * width, len(inverse))
        for step in range(steps):
            scores = _scores(inverse_mww, square_mww).masked_fill_(~(alive & waiting[groups]), torch.inf)
            index = int(scores.argmin())
            item, done = slice(index * width, (index + 1) * width), slice(0, step * width)
            inverse_wi = inverse[item] - spread_pi[done, item].T @ spread_pi[done]
            square_wi = (
                square[item] - change_pi[done, item].T @ spread_pi[done] - spread_pi[done, item].T @ change_pi[done]
            )
            spread_wi, change_wi = _factors(inverse_wi, square_wi, item)
            new = slice(step * width, (step + 1) * width)
            spread_pi[new], change_pi[new] = spread_wi, change_wi
            spread_mww, change_mww = (x.view(width, -1, width).transpose(0, 1) for x in (spread_wi, change_wi))
            inverse_mww -= _products(spread_mww, spread_mww)
            cross_mww = _products(change_mww, spread_mww)
            square_mww -= cross_mww + cross_mww.mT
            inverse_mww[index] = torch.eye(width)
            alive[index] = False
            group = int(groups[index])
            removed[group].append(int(items[index]))
            waiting[group] = False
            if not waiting.any():
                waiting.fill_(True)
        kept = alive.repeat_interleave(width).nonzero().flatten()
        spread_pi, change_pi = spread_pi[:, kept], change_pi[:, kept]
        inverse = inverse[kept][:, kept].addmm_(spread_pi.T, spread_pi, alpha=-1)
        square = square[kept][:, kept].addmm_(
            torch.cat([spread_pi, change_pi]).T, torch.cat([change_pi, spread_pi]), alpha=-1
        )
        items = items[alive]
    return torch.tensor([item for group in removed for item in reversed(group)])


def _diagonal(matrix_ii: torch.Tensor, width: int) -> torch.Tensor:
    """Return a copy of the diagonal blocks."""
    blocks = matrix_ii.unflatten(0, (-1, width)).unflatten(2, (-1, width))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _scores(inverse_mww: torch.Tensor, square_mww: torch.Tensor) -> torch.Tensor:
    if inverse_mww.shape[1] == 1:
        return (square_mww / inverse_mww).flatten()
    # not by LU: with several threads, PyTorch's LU of a batch of such sizes hangs or fails (pytorch/pytorch#142815)
    solved_mww = torch.cholesky_solve(square_mww, torch.linalg.cholesky(inverse_mww))
    return solved_mww.diagonal(dim1=1, dim2=2).sum(1)


def _factors(inverse_wi: torch.Tensor, square_wi: torch.Tensor, item: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U and V of an item from its rows; ``item`` is the slice of its columns."""
    if len(inverse_wi) == 1:
        scale = inverse_wi[0, item].rsqrt()
        spread_wi, square_wi = inverse_wi * scale, square_wi * scale
        return spread_wi, square_wi - 0.5 * scale * square_wi[0, item] * spread_wi
    factor = torch.linalg.cholesky(inverse_wi[:, item])
    spread_wi = torch.linalg.solve_triangular(factor, inverse_wi, upper=False)
    square_wi = torch.linalg.solve_triangular(factor, square_wi, upper=False)
    inner_ww = torch.linalg.solve_triangular(factor, square_wi[:, item].T, upper=False)
    return spread_wi, square_wi - 0.5 * inner_ww @ spread_wi


def _products(left_mww: torch.Tensor, right_mww: torch.Tensor) -> torch.Tensor:
    return left_mww * right_mww if left_mww.shape[1] == 1 else left_mww.mT @ right_mww
