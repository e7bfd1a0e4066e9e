"""Saving the checkpoint of an allocation, and checking its parameters on disk against the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from allocator.core.errors import UserError
from allocator.core.space import Allocation, SearchSpace
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.model.live.write import count_params, read_tensors, write_checkpoint
from allocator.pruning.levels.assemble import Assembler
from allocator.pruning.levels.compact import CompactLevels


def save_pruned(
    allocation: Allocation,
    checkpoint: Checkpoint,
    layout: Layout,
    space: SearchSpace,
    compact: Callable[[str], CompactLevels],
    out: Path,
) -> int:
    """Write the checkpoint of an allocation, count its parameters on disk, and return the count.

    Args:
        allocation: One level per unit.
        checkpoint: The dense model.
        layout: Its sub-blocks.
        space: Its units and their ladders.
        compact: Returns a unit's compact levels: a level store, or levels that were pruned along the allocation.
        out: A folder that does not exist yet.

    Raises:
        UserError: The saved checkpoint does not have the number of parameters that the allocation has.
    """
    levels = {unit.name: level for unit, level in zip(space.units, allocation, strict=True)}

    def replace(sub_block: str) -> dict[str, torch.Tensor | None]:
        # a new assembler for each sub-block, so that its dense tensors are freed afterwards
        return dict(Assembler(checkpoint, layout, space, compact).sub_block(sub_block, levels))

    write_checkpoint(checkpoint, layout, replace, out)
    planned, counted = space.cost(allocation), count_params(out, space, checkpoint)
    if not planned - _kept_zeros(levels, checkpoint, space, compact) <= counted <= planned:
        raise UserError(
            f"{out}: holds {counted} parameters, and the plan says {planned}. Please report this as a defect"
        )
    return counted


def _kept_zeros(
    levels: Mapping[str, int], checkpoint: Checkpoint, space: SearchSpace, compact: Callable[[str], CompactLevels]
) -> int:
    """Return an upper bound on kept weights that are zero: zero in the dense matrix, or updated to zero."""
    zeros = 0
    for unit in space.units:
        if unit.kind == "matrix":
            level, name = levels[unit.name], f"{unit.name}.weight"
            values = compact(unit.name).get(f"values.{level}") if level else None
            values = read_tensors(checkpoint, [name])[name] if values is None else values
            zeros += int((values == 0).sum())
    return zeros
