"""The part that targets share which carry weights: the checkpoint, and the sizes that a configuration states."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch

from allocator.core.errors import UserError
from allocator.core.space import Unit
from allocator.interop.contract import Source
from allocator.interop.verification import VERIFY
from allocator.model.checkpoint.headers import Checkpoint, read_checkpoint
from allocator.model.live.write import read_tensors

COMPARE = f"to compare it with the plan, in its folder: python {VERIFY} ."
"""Line for the user about a checkpoint with the script next to it."""

WIDTH, HEADS = "intermediate_size", ("num_key_value_heads", "num_attention_heads")
"""Llama's configuration keys for the channels and the heads of sub-blocks."""

_REMEDY = "Make it with 'allocator prune PLAN --out FOLDER', and name it with --checkpoint FOLDER"


def open_executed(source: Source, target: str) -> Checkpoint:
    """Open the checkpoint of a plan.

    Raises:
        UserError: There is none, or it differs from the plan.
    """
    folder = source.executed
    if folder is None or not folder.is_dir():
        where = "next to the plan" if folder is None else f"at {folder}"
        raise UserError(f"export: {target} carries weights, and there is no checkpoint {where}. {_REMEDY}")
    checkpoint = read_checkpoint(folder).with_names_of(source.checkpoint)
    if difference := next(_find_differences(source, checkpoint), None):
        raise UserError(f"export: {folder} is no checkpoint of this plan: {difference}. {_REMEDY}")
    return checkpoint


def _find_differences(source: Source, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the differences between a checkpoint and its plan. Weights are read only where there are masks."""
    planned = {f"{matrix.module}.weight": matrix for matrix in source.matrices}
    for name, dense in source.checkpoint.shapes.items():
        if len(dense) != 2:
            continue
        matrix, stored = planned.get(name), checkpoint.shapes.get(name, (0, 0))
        shape = dense if matrix is None else matrix.kept_shape
        if stored != shape:
            yield f"{name} is {_format_shape(stored)}, and {_format_shape(shape)} is planned"
        elif matrix is not None and matrix.zeros:
            left = int(torch.count_nonzero(read_tensors(checkpoint, [name])[name]))
            if left > matrix.kept:
                yield f"{name} has {left} weights that are not zero, and {matrix.kept} are planned"
    plan, stored_params = source.plan, sum(map(prod, checkpoint.shapes.values()))
    if plan.space.pattern == "structured" and stored_params != plan.space.cost(plan.allocation):
        yield f"it holds {stored_params:,} parameters, and {plan.space.cost(plan.allocation):,} are planned"


def _format_shape(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if all(shape) else "absent"


def state_head_dim(source: Source) -> dict[str, int]:
    """Return the ``head_dim`` of the model, because a configuration without it divides its width by its heads."""
    heads = int(source.checkpoint.config["num_attention_heads"])
    attention = [sub_block for sub_block in source.layout.sub_blocks if sub_block.kind != "channels"]
    return {"head_dim": attention[0].width * attention[0].total // heads} if attention else {}


def uses_llama_keys(source: Source) -> bool:
    """Tell whether the configuration has Llama's keys for the sizes of sub-blocks, and no matrix is fused."""
    separate = (
        len(sub_block.inputs) == len(sub_block.rows)
        and not sub_block.counts
        and (sub_block.kind != "kv_groups" or len(sub_block.rows) == 3)
        for sub_block in source.layout.sub_blocks
    )
    return not source.layout.mixtures and all(separate) and {WIDTH, *HEADS} <= source.checkpoint.config.keys()


def state_sizes(unit: Unit, items: int, config: Any) -> dict[str, int]:
    """Return the sizes of a sub-block with a number of items, in Llama's keys."""
    if unit.kind == "channels":
        return {WIDTH: items}
    if unit.kind == "query_heads":
        return {"num_attention_heads": items}
    assert unit.kind == "kv_groups", unit.kind
    return {key: items * config[key] // unit.total for key in HEADS}
