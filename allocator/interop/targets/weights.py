"""What the targets that carry weights have in common: the checkpoint, and the sizes that a configuration states."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch

from allocator.core.errors import UserError
from allocator.core.space import Unit
from allocator.interop.contract import VERIFY, Source
from allocator.model.checkpoint.headers import Checkpoint, read_checkpoint
from allocator.model.live.write import read_tensors

COMPARE = f"to compare it with the plan, in its folder: python {VERIFY} ."
"""What is said of a checkpoint that has the script beside it."""

WIDTH, HEADS = "intermediate_size", ("num_key_value_heads", "num_attention_heads")
"""Llama's keys for the channels and the heads of sub-blocks."""

_REMEDY = "Make it with 'allocator prune PLAN --out FOLDER', and name it with --checkpoint FOLDER"


def executed(source: Source, target: str) -> Checkpoint:
    """Return the checkpoint of a plan.

    Raises:
        UserError: It is not at hand, or does not hold what the plan says.
    """
    folder = source.executed
    if folder is None or not folder.is_dir():
        where = "beside the plan" if folder is None else f"at {folder}"
        raise UserError(f"export: {target} carries weights, and there is no checkpoint {where}. {_REMEDY}")
    checkpoint = read_checkpoint(folder).named_like(source.checkpoint)
    if wrong := next(_wrong(source, checkpoint), None):
        raise UserError(f"export: {folder} is no checkpoint of this plan: {wrong}. {_REMEDY}")
    return checkpoint


def _wrong(source: Source, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what a checkpoint holds against the plan; the weights are read of masks only."""
    planned = {f"{matrix.module}.weight": matrix for matrix in source.matrices}
    for name, dense in source.checkpoint.shapes.items():
        if len(dense) != 2:
            continue
        matrix, found = planned.get(name), checkpoint.shapes.get(name, (0, 0))
        shape = dense if matrix is None else matrix.kept_shape
        if found != shape:
            yield f"{name} is {_shown(found)}, and {_shown(shape)} is planned"
        elif matrix is not None and matrix.zeros:
            left = int(torch.count_nonzero(read_tensors(checkpoint, [name])[name]))
            if left > matrix.kept:
                yield f"{name} has {left} weights that are not zero, and {matrix.kept} are planned"
    plan, held = source.plan, sum(map(prod, checkpoint.shapes.values()))
    if plan.space.pattern == "structured" and held != plan.space.cost(plan.allocation):
        yield f"it holds {held:,} parameters, and {plan.space.cost(plan.allocation):,} are planned"


def _shown(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if all(shape) else "absent"


def head_dim(source: Source) -> dict[str, int]:
    """Return the width of a head, which a configuration may leave to be divided out of its heads."""
    heads = int(source.checkpoint.config["num_attention_heads"])
    attention = [sub_block for sub_block in source.layout.sub_blocks if sub_block.kind != "channels"]
    return {"head_dim": attention[0].width * attention[0].total // heads} if attention else {}


def in_keys_of_llama(source: Source) -> bool:
    """Whether the configuration states the sizes of sub-blocks in Llama's keys, and each matrix is one part of them."""
    separate = (
        len(sub_block.inputs) == len(sub_block.rows)
        and not sub_block.counts
        and (sub_block.kind != "kv_groups" or len(sub_block.rows) == 3)
        for sub_block in source.layout.sub_blocks
    )
    return not source.layout.mixtures and all(separate) and {WIDTH, *HEADS} <= source.checkpoint.config.keys()


def sizes(unit: Unit, items: int, config: Any) -> dict[str, int]:
    """Return what a configuration says of a sub-block that holds so many items, in the keys of Llama."""
    if unit.kind == "channels":
        return {WIDTH: items}
    if unit.kind == "query_heads":
        return {"num_attention_heads": items}
    assert unit.kind == "kv_groups", unit.kind
    return {key: items * config[key] // unit.total for key in HEADS}
