"""Compact forms of matrices with single weights removed: packed, and decoded.

Shapes: o output rows, i input features, k kept weights. ``weight_oi``, ``values_k``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def pack_mask(kept_oi: torch.Tensor) -> torch.Tensor:
    """Return a mask as bytes, eight positions to each in row-major order, the lowest bit first."""
    flat = kept_oi.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (bits << _places(bits)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the mask of a shape from what :func:`pack_mask` made."""
    bits = (mask[:, None] >> _places(mask)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def kept_mask(compact: Mapping[str, torch.Tensor], level: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return which weights of a matrix a level beyond the dense one keeps, whatever their values."""
    if "removed_at" in compact:
        return compact["removed_at"].to(device) > level
    return unpack_mask(compact[f"mask.{level}"].to(device), shape)


def sparse_weight(compact: Mapping[str, torch.Tensor], level: int, dense_oi: torch.Tensor) -> torch.Tensor:
    """Return a matrix at a level, in the data type of the dense one; zero where the level removes.

    Args:
        compact: Nested masks, or masks with values. See :class:`~allocator.pruning.pruners.registry.LocalPruner`.
        level: The level, beyond the dense one.
        dense_oi: The dense matrix.
    """
    kept_oi = kept_mask(compact, level, dense_oi.shape, dense_oi.device)
    if "removed_at" in compact:
        return dense_oi * kept_oi
    return torch.zeros_like(dense_oi).masked_scatter_(kept_oi, compact[f"values.{level}"].to(dense_oi))


def _places(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
