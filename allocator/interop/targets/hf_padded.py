"""Export target for Hugging Face without remote code. Zeros pad every layer to the width of the widest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from allocator.core.errors import UserError
from allocator.core.space import Unit
from allocator.interop.contract import Source, Target
from allocator.interop.verification import write_verify
from allocator.interop.weights import COMPARE, HEADS, WIDTH, open_executed, state_head_dim, state_sizes
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.checkpoint.stock import build_stock_config
from allocator.model.live.load import list_stock_shapes
from allocator.model.live.write import find_dtype, read_tensors, write_companions


class HuggingFacePadded(Target):
    """Writes a checkpoint of the dense model's own class. It needs no code next to it.

    The zeros change nothing. A channel of zeros, or a head with zero queries, keys and values, gives zeros to the
    output projection for any attention, and no other head reads it. Only rounding differs, because sums have more
    terms.

    A configuration without KV heads, such as GPT-NeoX's, computes the width of a head from its query heads. Attention
    is then padded to all of its heads.
    """

    name = "hf-padded"
    writes = "checkpoint of the stock class, padded to the widest layer"
    patterns = ("structured",)

    def check(self, source: Source) -> None:
        """Check the checkpoint, and that the stock class has a place for every tensor.

        Raises:
            UserError: The class lacks a place for a tensor, or cannot express the plan.
        """
        if source.layout.mixtures:
            raise UserError(
                f"export: {self.name} pads channels and heads, and {source.checkpoint.architecture} is a mixture of "
                "experts. Use --to hf"
            )
        if WIDTH not in source.checkpoint.config:
            raise UserError(
                f"export: {self.name} knows only the configuration keys of Llama-like models, and that of "
                f"{source.checkpoint.architecture} has no {WIDTH}. Use --to hf"
            )
        if misfit := next(_find_misfits(source, _plan_padding(source)), None):
            raise UserError(f"export: {self.name} cannot express this plan: {misfit}. Use --to hf")

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the model file by file; report the saving."""
        model, checkpoint = _plan_padding(source), source.checkpoint
        shard_of = {name: checkpoint.shards[_dense_name(name, checkpoint)] for name in sorted(model.shapes)}
        for shard in sorted({*shard_of.values()}):
            tensors = _read_padded_tensors(source, model, [name for name, file in shard_of.items() if file == shard])
            try:
                save_file(tensors, folder / shard, metadata={"format": "pt"})
            except SafetensorError as error:
                raise UserError(
                    f"export: {shard} cannot be written ({error}). Free some space, or name another disk with --out"
                ) from None
        write_companions(folder, checkpoint, model.config, shard_of)
        stored = [(matrix.module, model.shapes[f"{matrix.module}.weight"]) for matrix in source.matrices]
        write_verify(folder, source, shapes=stored)
        return [_describe_saving(source, model), COMPARE]


TARGET = HuggingFacePadded()


@dataclass(frozen=True)
class _PaddedModel:
    """The padded model.

    Attributes:
        compact: The executed plan.
        config: The content of ``config.json``.
        widths: Number of items that every sub-block of a kind is padded to.
        shapes: The shape of every tensor. Tied tensors appear once.
    """

    compact: Checkpoint
    config: Mapping[str, Any]
    widths: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def _plan_padding(source: Source) -> _PaddedModel:
    plan, checkpoint = source.plan, source.checkpoint
    compact = open_executed(source, HuggingFacePadded.name)
    stated = {*HEADS} <= checkpoint.config.keys()
    config = {**checkpoint.config, **(state_head_dim(source) if stated else {}), **_enable_biases(source, compact)}
    widths: dict[str, int] = {}
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        # at least one item per group, because no class can be built with none
        widths[unit.kind] = max(widths.get(unit.kind, unit.num_groups), unit.kept[level])
    for kind, unit in {unit.kind: unit for unit in plan.space.units}.items():
        if kind != "channels" and not stated:
            widths[kind] = unit.total
            continue
        widths[kind] = _find_accepted_width(unit, widths[kind], checkpoint, config)
        config |= state_sizes(unit, widths[kind], checkpoint.config)
    stock = list_stock_shapes(checkpoint, config)
    # the class renames some tensors when it loads; these are outside units and keep their shape
    shapes = {name: stock.get(name, shape) for name, shape in checkpoint.shapes.items()}
    gained = {name: shape for name, shape in stock.items() if _dense_name(name, checkpoint) in checkpoint.shapes}
    return _PaddedModel(compact, config, widths, shapes | gained)


def _enable_biases(source: Source, compact: Checkpoint) -> dict[str, bool]:
    """Return Llama's configuration keys for the biases that output projections gained."""
    gained = compact.shapes.keys() - source.checkpoint.shapes.keys()
    return {
        f"{sub_block.part}_bias": True for sub_block in source.layout.sub_blocks if f"{sub_block.output}.bias" in gained
    }


def _find_accepted_width(unit: Unit, items: int, checkpoint: Checkpoint, config: Mapping[str, Any]) -> int:
    """Return the smallest width of at least ``items`` that the stock class accepts.

    For example, Llama's class accepts only numbers of heads that divide its hidden size.
    """
    for width in range(items, unit.total, unit.num_groups):
        try:
            build_stock_config(
                checkpoint.folder, checkpoint.architecture, {**config, **state_sizes(unit, width, checkpoint.config)}
            )
        except UserError:
            continue
        return width
    return unit.total


def _find_misfits(source: Source, model: _PaddedModel) -> Iterator[str]:
    """Describe each tensor that the stock class lacks, or whose shape there differs from its configuration."""
    architecture = source.checkpoint.architecture
    for name in sorted(model.compact.shapes.keys() - source.checkpoint.shapes.keys() - model.shapes.keys()):
        yield f"{architecture} has no {name}, which the search added (pruner.bias)"
    for sub_block in source.layout.sub_blocks:
        items = model.widths[sub_block.kind]
        for module, axis, size in (
            *((module, 0, rows) for module, rows in sub_block.rows.items()),
            (sub_block.output, 1, sub_block.width),
        ):
            width = model.shapes[f"{module}.weight"][axis]
            if width != size * items:
                yield f"{architecture} gives {module} a width of {width}, where its configuration says {size * items}"


def _read_padded_tensors(source: Source, model: _PaddedModel, names: list[str]) -> dict[str, torch.Tensor]:
    """Read tensors of the padded model. Those that the compact checkpoint lacks are zeros."""
    checkpoint = source.checkpoint
    stored = read_tensors(model.compact, [name for name in names if name in model.compact.shapes])
    units = {unit.name: unit for unit in source.plan.space.units}
    groups = {
        module: units[sub_block.name].num_groups
        for sub_block in source.layout.sub_blocks
        for module in sub_block.modules
    }
    runs = {
        m: [matrix.rows for matrix in sub_block.inputs if matrix.module == m]
        for sub_block in source.layout.sub_blocks
        for m in sub_block.rows
    }

    def tensor(name: str) -> torch.Tensor:
        if name not in stored:
            return torch.zeros(model.shapes[name], dtype=find_dtype(checkpoint.dtypes[_dense_name(name, checkpoint)]))
        module = name.rpartition(".")[0]
        return pad(stored[name], model.shapes[name], groups.get(module, 1), runs.get(module, [1]))

    return {name: tensor(name) for name in names}


def pad(tensor: torch.Tensor, shape: tuple[int, ...], groups: int, runs: Sequence[int]) -> torch.Tensor:
    """Pad a tensor with zeros to a shape.

    Args:
        tensor: The tensor.
        shape: The shape to reach.
        groups: Number of equal parts of the rows or columns. Each part is padded at its end.
        runs: Rows per item, for each run of rows.
    """
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            shares = runs if axis == 0 else [1]
            pieces = torch.split(tensor, [tensor.shape[axis] * share // sum(shares) for share in shares], axis)
            extents = [size * share // sum(shares) for share in shares]
            padded = [_pad_groups(piece, axis, extent, groups) for piece, extent in zip(pieces, extents, strict=True)]
            tensor = torch.cat(padded, axis)
    return tensor.contiguous()


def _pad_groups(tensor: torch.Tensor, axis: int, size: int, groups: int) -> torch.Tensor:
    parts = tensor.reshape(*tensor.shape[:axis], groups, -1, *tensor.shape[axis + 1 :])
    extent = [*parts.shape]
    extent[axis + 1] = size // groups - extent[axis + 1]
    return torch.cat([parts, parts.new_zeros(extent)], axis + 1).flatten(axis, axis + 1)


def _dense_name(name: str, checkpoint: Checkpoint) -> str:
    """Return the tensor itself if the dense model has it, or the weight that a new bias belongs to."""
    return name if name in checkpoint.shapes else f"{name.removesuffix('.bias')}.weight"


def _describe_saving(source: Source, model: _PaddedModel) -> str:
    space, allocation = source.plan.space, source.plan.allocation
    dense, planned, stored = space.cost(space.dense), space.cost(allocation), sum(map(prod, model.shapes.values()))
    saved = f"{1 - stored / dense:.1%} saved" if stored < dense else "padding saves nothing"
    changes = [f"{key} {value}" for key, value in model.config.items() if source.checkpoint.config.get(key) != value]
    says = f"; config.json says {', '.join(changes)}" if changes else ""
    return f"{stored:,} parameters stored, of {dense:,} dense and {planned:,} planned: {saved}{says}"
