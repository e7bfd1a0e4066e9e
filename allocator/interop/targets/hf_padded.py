"""A structured plan for stock classes: every layer as wide as the widest, with zeros for what it lacks."""

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
from allocator.model.checkpoint.stock import stock_config
from allocator.model.live.load import stock_shapes
from allocator.model.live.write import dtype_of, read_tensors, write_companions


class HuggingFacePadded(Target):
    """Writes a checkpoint of the dense model's own class, which needs no code beside it.

    The zeros add nothing: a channel of zeros, or a head whose queries, keys and values are, gives the output projection
    zeros, whatever the attention, and no other head sees it. Sums of more terms round differently.

    A configuration that does not state KV heads, as GPT-NeoX's, divides the width of a head out of its query heads:
    attention is then padded to all of its heads.
    """

    name = "hf-padded"
    writes = "checkpoint of the stock class, padded to the widest layer"
    patterns = ("structured",)

    def check(self, source: Source) -> None:
        """Check the checkpoint, and that the stock class has a place for every tensor."""
        if source.layout.mixtures:
            raise UserError(
                f"export: {self.name} pads channels and heads, and {source.checkpoint.architecture} is a mixture of "
                "experts. Use --to hf"
            )
        if WIDTH not in source.checkpoint.config:
            raise UserError(
                f"export: {self.name} knows the configuration keys of Llama-like models alone, and that of "
                f"{source.checkpoint.architecture} has no {WIDTH}. Use --to hf"
            )
        if wrong := next(_misfits(source, _padded(source)), None):
            raise UserError(f"export: {self.name} cannot express this plan: {wrong}. Use --to hf")

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the model file by file, and say what is saved."""
        model, checkpoint = _padded(source), source.checkpoint
        homes = {name: checkpoint.shards[_known(name, checkpoint)] for name in sorted(model.shapes)}
        for shard in sorted({*homes.values()}):
            tensors = _tensors(source, model, [name for name, parent in homes.items() if parent == shard])
            try:
                save_file(tensors, folder / shard, metadata={"format": "pt"})
            except SafetensorError as error:
                raise UserError(
                    f"export: {shard} cannot be written ({error}). Free some space, or name another disk with --out"
                ) from None
        write_companions(folder, checkpoint, model.config, homes)
        stored = [(matrix.module, model.shapes[f"{matrix.module}.weight"]) for matrix in source.matrices]
        write_verify(folder, source, shapes=stored)
        return [_saving(source, model), COMPARE]


TARGET = HuggingFacePadded()


@dataclass(frozen=True)
class _Padded:
    """The padded model.

    Attributes:
        compact: The executed plan.
        config: The content of ``config.json``.
        widths: Items that every sub-block of a kind is padded to.
        shapes: Shape of every tensor; tied ones once.
    """

    compact: Checkpoint
    config: Mapping[str, Any]
    widths: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def _padded(source: Source) -> _Padded:
    plan, checkpoint = source.plan, source.checkpoint
    compact = open_executed(source, HuggingFacePadded.name)
    stated = {*HEADS} <= checkpoint.config.keys()
    config = {**checkpoint.config, **(state_head_dim(source) if stated else {}), **_biased(source, compact)}
    widths: dict[str, int] = {}
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        # one item at least, or one of every group: no class is made for none
        widths[unit.kind] = max(widths.get(unit.kind, unit.num_groups), unit.kept[level])
    for kind, unit in {unit.kind: unit for unit in plan.space.units}.items():
        if kind != "channels" and not stated:
            widths[kind] = unit.total
            continue
        widths[kind] = _accepted(unit, widths[kind], checkpoint, config)
        config |= state_sizes(unit, widths[kind], checkpoint.config)
    stock = stock_shapes(checkpoint, config)
    # what the class calls otherwise as it loads lies outside of units, and stays as it is
    shapes = {name: stock.get(name, shape) for name, shape in checkpoint.shapes.items()}
    gained = {name: shape for name, shape in stock.items() if _known(name, checkpoint) in checkpoint.shapes}
    return _Padded(compact, config, widths, shapes | gained)


def _biased(source: Source, compact: Checkpoint) -> dict[str, bool]:
    """Return what makes room for biases that output projections gained, in the keys of Llama."""
    gained = compact.shapes.keys() - source.checkpoint.shapes.keys()
    return {
        f"{sub_block.part}_bias": True for sub_block in source.layout.sub_blocks if f"{sub_block.output}.bias" in gained
    }


def _accepted(unit: Unit, items: int, checkpoint: Checkpoint, config: Mapping[str, Any]) -> int:
    """Return the fewest items, so many or more, that the stock class takes: Llama's wants heads to divide its width."""
    for width in range(items, unit.total, unit.num_groups):
        try:
            stock_config(
                checkpoint.folder, checkpoint.architecture, {**config, **state_sizes(unit, width, checkpoint.config)}
            )
        except UserError:
            continue
        return width
    return unit.total


def _misfits(source: Source, model: _Padded) -> Iterator[str]:
    """Yield what the stock class has no place for, or makes of another shape than its configuration says."""
    architecture = source.checkpoint.architecture
    for name in sorted(model.compact.shapes.keys() - source.checkpoint.shapes.keys() - model.shapes.keys()):
        yield f"{architecture} has no {name}, which the search added (pruner.bias)"
    for sub_block in source.layout.sub_blocks:
        items = model.widths[sub_block.kind]
        for module, axis, size in (
            *((module, 0, rows) for module, rows in sub_block.rows.items()),
            (sub_block.output, 1, sub_block.width),
        ):
            found = model.shapes[f"{module}.weight"][axis]
            if found != size * items:
                yield f"{architecture} gives {module} a width of {found}, where its configuration says {size * items}"


def _tensors(source: Source, model: _Padded, names: list[str]) -> dict[str, torch.Tensor]:
    """Return tensors of the padded model; those that the checkpoint lacks are zeros."""
    checkpoint, found = (
        source.checkpoint,
        read_tensors(model.compact, [name for name in names if name in model.compact.shapes]),
    )
    units = {unit.name: unit for unit in source.plan.space.units}
    groups = {
        module: units[sub_block.name].num_groups
        for sub_block in source.layout.sub_blocks
        for module in sub_block.modules
    }
    runs = {
        m: [own.rows for own in sub_block.inputs if own.module == m]
        for sub_block in source.layout.sub_blocks
        for m in sub_block.rows
    }

    def tensor(name: str) -> torch.Tensor:
        if name not in found:
            return torch.zeros(model.shapes[name], dtype=dtype_of(checkpoint.dtypes[_known(name, checkpoint)]))
        module = name.rpartition(".")[0]
        return pad(found[name], model.shapes[name], groups.get(module, 1), runs.get(module, [1]))

    return {name: tensor(name) for name in names}


def pad(tensor: torch.Tensor, shape: tuple[int, ...], groups: int, runs: Sequence[int]) -> torch.Tensor:
    """Return a tensor of this shape, with zeros at the end of what was too short.

    Args:
        tensor: What is padded.
        shape: What it is padded to.
        groups: In how many parts its rows, or columns, are padded each.
        runs: Rows of an item in each of the runs that its rows consist of.
    """
    for axis, size in enumerate(shape):
        if tensor.shape[axis] != size:
            shares = runs if axis == 0 else [1]
            pieces = torch.split(tensor, [tensor.shape[axis] * share // sum(shares) for share in shares], axis)
            extents = [size * share // sum(shares) for share in shares]
            padded = [_padded_to(piece, axis, extent, groups) for piece, extent in zip(pieces, extents, strict=True)]
            tensor = torch.cat(padded, axis)
    return tensor.contiguous()


def _padded_to(tensor: torch.Tensor, axis: int, size: int, groups: int) -> torch.Tensor:
    parts = tensor.reshape(*tensor.shape[:axis], groups, -1, *tensor.shape[axis + 1 :])
    extent = [*parts.shape]
    extent[axis + 1] = size // groups - extent[axis + 1]
    return torch.cat([parts, parts.new_zeros(extent)], axis + 1).flatten(axis, axis + 1)


def _known(name: str, checkpoint: Checkpoint) -> str:
    """Return the dense tensor that a tensor lies with: itself, or the weight that a new bias goes with."""
    return name if name in checkpoint.shapes else f"{name.removesuffix('.bias')}.weight"


def _saving(source: Source, model: _Padded) -> str:
    space, allocation = source.plan.space, source.plan.allocation
    dense, planned, stored = space.cost(space.dense), space.cost(allocation), sum(map(prod, model.shapes.values()))
    saved = f"{1 - stored / dense:.1%} saved" if stored < dense else "padding saves nothing"
    changes = [f"{key} {value}" for key, value in model.config.items() if source.checkpoint.config.get(key) != value]
    says = f"; config.json says {', '.join(changes)}" if changes else ""
    return f"{stored:,} parameters stored, of {dense:,} dense and {planned:,} planned: {saved}{says}"
