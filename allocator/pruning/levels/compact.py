"""What a local pruner returns for one unit, and a level store keeps: the compact form of all its levels.

It has one of three forms:

- structured: ``order`` [items], the items from the last removed to the first, so that a level keeps a prefix (of every
  group's part of the order, where the unit has groups); ``output.<level>`` [out, kept columns], the refitted output
  projection with its columns in that order, except for whole experts; optionally ``bias.<level>`` [out], to be added to
  the bias of the output projection;
- nested masks: ``removed_at`` [out, in], uint8, the first level that removes each weight;
- masks with values: ``mask.<level>``, uint8, the kept positions packed eight to a byte in row-major order, the lowest
  bit first, and ``values.<level>``, the kept values in that order.

Shapes: o output rows, i input features, k kept weights. ``weight_oi``, ``values_k``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

CompactLevels = Mapping[str, torch.Tensor]
"""The compact levels of one unit, by the names above."""

NEVER = 255
"""The value in ``removed_at`` of a weight that every level keeps."""


def cast_values(compact: CompactLevels, dtype: torch.dtype) -> CompactLevels:
    """Return compact levels whose floating-point tensors have a data type."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in compact.items()}


def item_columns(items: torch.Tensor, width: int) -> torch.Tensor:
    """Return the columns of items, in the order of the items; each item has ``width`` consecutive columns."""
    return (items[:, None] * width + torch.arange(width)).flatten()
