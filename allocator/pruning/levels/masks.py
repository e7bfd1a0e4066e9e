"""Masks of matrices with single weights removed: packed into bytes, unpacked, and applied.

Shapes: o output rows, i input features, k kept weights. ``weight_oi``, ``values_k``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def pack_mask(kept_oi: torch.Tensor) -> torch.Tensor:
    """Return a mask as bytes, eight positions in each, in row-major order, the lowest bit first."""
    flat = kept_oi.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (bits << _bit_numbers(bits)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the mask of a shape from the bytes of :func:`pack_mask`."""
    bits = (mask[:, None] >> _bit_numbers(mask)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def kept_mask(compact: Mapping[str, torch.Tensor], level: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return which weights of a matrix a level keeps, [out, in]; kept weights may be zero. The level is not dense."""
    if "removed_at" in compact:
        return compact["removed_at"].to(device) > level
    return unpack_mask(compact[f"mask.{level}"].to(device), shape)


def sparse_weight(compact: Mapping[str, torch.Tensor], level: int, dense_oi: torch.Tensor) -> torch.Tensor:
    """Return a matrix at a level, in the data type of the dense one; removed weights are zero.

    Args:
        compact: Nested masks, or masks with values; see :mod:`allocator.pruning.levels.compact`.
        level: The level; not 0, the dense one.
        dense_oi: The dense matrix.
    """
    kept_oi = kept_mask(compact, level, dense_oi.shape, dense_oi.device)
    if "removed_at" in compact:
        return dense_oi * kept_oi
    return torch.zeros_like(dense_oi).masked_scatter_(kept_oi, compact[f"values.{level}"].to(dense_oi))


def _bit_numbers(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
