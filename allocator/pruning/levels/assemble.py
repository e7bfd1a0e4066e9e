"""From compact levels to weights: assembled for a checkpoint, or switched in place in a live model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from allocator.core.space import SearchSpace, Unit
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.model.family.sub_blocks import Rows, SubBlock
from allocator.model.live.modeling_pruned import choose, counted, recount, regroup, remove
from allocator.model.live.write import Replacements, read_tensors
from allocator.pruning.levels.compact import CompactLevels, item_columns
from allocator.pruning.levels.masks import sparse_weight

OUTPUT_BYTES = 1 << 30
"""Memory for output projections that are ready to use. Beyond it, the least recently used one is dropped."""

_ALIGNMENT = 64


class Assembler:
    """Makes the weights of any unit at any level.

    Each dense tensor is held once. While a structured unit is dense, its rows have the checkpoint's order. When it is
    pruned, they are permuted into the order of removal, so that every level is a prefix: a view, not a copy. Only the
    output projections of levels are separate tensors.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        space: SearchSpace,
        compact: Callable[[str], CompactLevels],
        model: nn.Module | None = None,
    ) -> None:
        """Take the dense tensors of units from a live model, or read them when they are needed.

        Args:
            checkpoint: The dense model.
            layout: Its sub-blocks.
            space: Its units and their ladders.
            compact: Returns the compact levels of a unit by its name.
            model: The dense model, loaded: results have its data type and device. None for tensors as on disk.
        """
        self._checkpoint, self._compact = checkpoint, compact
        self._units = {unit.name: unit for unit in space.units}
        self._sub_blocks = {sub_block.name: sub_block for sub_block in layout.sub_blocks}
        self._members = {
            sub_block.name: [u for u in space.units if u.name == sub_block.name or u.name in sub_block.modules]
            for sub_block in layout.sub_blocks
        }
        self._dense: dict[str, dict[str, torch.Tensor]] = {}
        self._permuted: set[str] = set()
        self._outputs: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self._room = OUTPUT_BYTES
        if model is not None:
            for name, unit in self._units.items():
                tensors = _find_tensors(model, self._modules_removed(name), buffers=unit.kind == "experts")
                for tensor in tensors.values():
                    tensor.data = _align(tensor.data)
                self._dense[name] = {key: tensor.detach() for key, tensor in tensors.items()}

    def unit(self, name: str, level: int) -> Replacements:
        """Return every tensor of a unit at a level, by parameter name; None for a removed tensor."""
        unit = self._units[name]
        dense = self._dense_tensors(name)
        if unit.kind == "matrix":
            if level == 0:
                return dict(dense)
            weight = f"{name}.weight"
            return {**dense, weight: sparse_weight(self._compact(name), level, dense[weight])}
        if unit.kept[level] == 0:
            return dict.fromkeys(dense)
        if unit.kind == "experts":
            return dict(dense) if level == 0 else self._keep_experts(self._sub_blocks[name], unit, level, dense)
        if (level > 0) != (name in self._permuted):
            self._permute(self._sub_blocks[name], dense)
        return dict(dense) if level == 0 else self._take_prefix(self._sub_blocks[name], unit, level, dense)

    def wide(self, name: str, level: int) -> dict[str, torch.Tensor]:
        """Return every tensor of a unit at a level in the shapes of the dense unit, with the outputs of that level.

        The weights of two levels in this form can be subtracted. The rows of a structured unit are in the order of
        removal, and its output projection is zero in the columns of removed items. Whole experts have no such form,
        because a router with fewer rows chooses differently.
        """
        unit = self._units[name]
        dense = self._dense_tensors(name)
        if unit.kind == "matrix":
            return {key: tensor for key, tensor in self.unit(name, level).items() if tensor is not None}
        sub_block, compact = self._sub_blocks[name], self._compact(name)
        if name not in self._permuted:
            self._permute(sub_block, dense)
        key = f"{sub_block.output}.weight"
        dense_oi = dense[key]
        if level == 0:
            order = item_columns(compact["order"].long(), sub_block.width)
            return {**dense, key: dense_oi[:, order.to(dense_oi.device)]}
        if unit.kept[level] == 0:
            output = f"{sub_block.output}."
            zeros = {name: torch.zeros_like(tensor) for name, tensor in dense.items() if name.startswith(output)}
            return {**dense, **zeros}
        written = self._new_tensors(sub_block, level, dense)
        by_group = written[key].unflatten(1, (unit.num_groups, -1))
        lost = dense_oi.shape[1] // unit.num_groups - by_group.shape[2]
        return {**dense, **written, key: functional.pad(by_group, (0, lost)).flatten(1)}

    def is_unit(self, name: str) -> bool:
        """Return whether a sub-block itself is a unit; if not, its matrices are."""
        return name in self._units and self._units[name].kind != "matrix"

    def sub_block(self, name: str, levels: Mapping[str, int]) -> Replacements:
        """Return every tensor of a sub-block whose units are at ``levels``; None for a removed tensor."""
        tensors: dict[str, torch.Tensor | None] = {}
        for unit in self._members[name]:
            tensors.update(self.unit(unit.name, levels[unit.name]))
        return tensors

    def _modules_removed(self, name: str) -> tuple[str, ...]:
        """Return the modules of a unit, which are removed with it."""
        return (name,) if self._units[name].kind == "matrix" else self._sub_blocks[name].modules_removed

    def _keep_experts(
        self, sub_block: SubBlock, unit: Unit, level: int, dense: Mapping[str, torch.Tensor]
    ) -> Replacements:
        """Return the tensors of the kept experts, and their rows of the router; None for removed experts."""
        by_group = self._compact(sub_block.name)["order"].long().view(unit.num_groups, -1)
        kept = by_group[:, : unit.kept[level] // unit.num_groups].flatten().sort().values
        kept_modules = {module for number in kept.tolist() for module in sub_block.experts[number]}
        expert_modules = {module for expert in sub_block.experts for module in expert}
        return {
            key: (dense[key] if module in kept_modules else None)
            if module in expert_modules
            else dense[key][kept.to(dense[key].device)]
            for key in dense
            for module in (key.rpartition(".")[0],)
        }

    def _dense_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._dense:
            prefixes = tuple(f"{module}." for module in self._modules_removed(name))
            names = [key for key in self._checkpoint.shapes if key.startswith(prefixes)]
            self._dense[name] = {key: _align(tensor) for key, tensor in read_tensors(self._checkpoint, names).items()}
        return self._dense[name]

    def _permute(self, sub_block: SubBlock, dense: dict[str, torch.Tensor]) -> None:
        """Put rows into the order of removal, or back into the order of the checkpoint."""
        order = self._compact(sub_block.name)["order"].long()
        items = order.argsort() if sub_block.name in self._permuted else order
        for module in sub_block.rows:
            runs = [rows.start + item_columns(items, rows.rows) for rows in sub_block.inputs if rows.module == module]
            order_rows = torch.cat(runs)
            for key in (f"{module}.weight", f"{module}.bias"):
                if key in dense:
                    dense[key] = dense[key][order_rows.to(dense[key].device)]
        self._permuted ^= {sub_block.name}

    def _take_prefix(
        self, sub_block: SubBlock, unit: Unit, level: int, dense: Mapping[str, torch.Tensor]
    ) -> Replacements:
        """Return the tensors of a structured unit at a level: prefixes of its rows, and a new output projection."""
        tensors = {**dense, **self._new_tensors(sub_block, level, dense)}
        for module in sub_block.rows:
            for key in (f"{module}.weight", f"{module}.bias"):
                if key in dense:
                    # a view if there is one group and one run of rows
                    runs = [
                        _take_kept(dense[key], rows, unit, level) for rows in sub_block.inputs if rows.module == module
                    ]
                    tensors[key] = runs[0] if len(runs) == 1 else torch.cat(runs)
        return tensors

    def _new_tensors(
        self, sub_block: SubBlock, level: int, dense: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that pruning changes: the output projection, and a bias that replaces lost outputs."""
        compact, output = self._compact(sub_block.name), dense[f"{sub_block.output}.weight"]
        tensors = {f"{sub_block.output}.weight": self._output(sub_block.name, level, output)}
        if f"bias.{level}" in compact:
            key, lost = f"{sub_block.output}.bias", compact[f"bias.{level}"].to(output.device, output.dtype, copy=True)
            tensors[key] = dense[key] + lost if key in dense else lost
        return tensors

    def _output(self, name: str, level: int, like: torch.Tensor) -> torch.Tensor:
        """Return an output projection at a level, in the data type and on the device of the dense one."""
        output_oi = self._outputs.pop((name, level), None)
        if output_oi is None:
            output_oi = self._compact(name)[f"output.{level}"].to(like.device, like.dtype, copy=True)
            self._room -= output_oi.nbytes
        self._outputs[name, level] = output_oi
        while self._room < 0:
            self._room += self._outputs.popitem(last=False)[1].nbytes
        return output_oi


class LevelSwitch:
    """Switches units of a live model between levels, in place."""

    def __init__(self, model: nn.Module, layout: Layout, assembler: Assembler) -> None:
        """Take over a dense model, whose modules and parameters are changed from now on."""
        self._model, self._assembler = model, assembler
        # sub-blocks that are units; the others never lose a module or an item
        self._sub_blocks = {
            sub_block.name: sub_block for sub_block in layout.sub_blocks if assembler.is_unit(sub_block.name)
        }
        self._originals = {
            module: model.get_submodule(module)
            for sub_block in self._sub_blocks.values()
            for module in sub_block.modules_removed
        }
        self._parents = {name: model.get_submodule(sub_block.parent) for name, sub_block in self._sub_blocks.items()}
        self._counts = {
            name: counted(self._parents[name], sub_block.counts) for name, sub_block in self._sub_blocks.items()
        }
        self._parameters: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._levels: dict[str, tuple[int, bool] | None] = {}

    def set(self, name: str, level: int, wide: bool = False) -> None:
        """Put a unit at a level, unless it is there; ``wide`` in dense shapes, except for whole experts."""
        wide = wide and not (name in self._sub_blocks and self._sub_blocks[name].experts)
        if self._levels.get(name, (0, False)) == (level, wide):
            return
        self._put(name, self._assembler.wide(name, level) if wide else self._assembler.unit(name, level))
        self._levels[name] = (level, wide)

    def blend(self, name: str, shares: Sequence[float]) -> None:
        """Put a unit, in dense shapes, at a weighted mean of its levels.

        What a structured unit adds is linear in its output projection, which reads the dense unit's items. So at the
        mean of its levels it adds the mean of what they add.

        Args:
            name: The unit.
            shares: The weight of each level.
        """
        levels = [self._assembler.wide(name, level) for level in range(len(shares))]
        blended: dict[str, torch.Tensor] = {}
        for key in dict.fromkeys(key for tensors in levels for key in tensors):
            parts = [(share, tensors[key]) for share, tensors in zip(shares, levels, strict=True) if key in tensors]
            blended[key] = torch.stack([share * tensor.float() for share, tensor in parts]).sum(0).to(parts[0][1].dtype)
        self._put(name, blended)
        self._levels[name] = None

    def _put(self, name: str, tensors: Replacements) -> None:
        if name in self._sub_blocks and self._sub_blocks[name].experts:
            self._choose(self._sub_blocks[name], tensors)
        elif all(tensor is None for tensor in tensors.values()):
            for module, part in self._sub_blocks[name].removal.items():
                remove(self._model, module, part)
        else:
            sub_block = self._sub_blocks.get(name)
            for module in () if sub_block is None else sub_block.modules_removed:
                self._model.set_submodule(module, self._originals[module])
            for key, tensor in tensors.items():
                assert tensor is not None
                # a parameter that is missing is a bias that pruning adds
                self._parameters.setdefault(key, nn.Parameter(tensor, requires_grad=False)).data = tensor
            if sub_block is not None:
                regroup(self._parents[name])
                project, kept = self._model.get_submodule(sub_block.output), tensors[f"{sub_block.output}.weight"]
                assert kept is not None
                recount(self._parents[name], self._counts[name], kept.shape[1] // sub_block.width, sub_block.total)
                bias = f"{sub_block.output}.bias"
                project.register_parameter("bias", self._parameters[bias] if bias in tensors else None)

    def _choose(self, sub_block: SubBlock, tensors: Replacements) -> None:
        """Let a router choose from the experts that have tensors."""
        (router,) = sub_block.rows
        kept = [
            number for number, (module, *_) in enumerate(sub_block.experts) if tensors[f"{module}.weight"] is not None
        ]
        choose(self._model, sub_block.name, router, kept, self._originals[sub_block.name], self._originals[router])
        for key, tensor in tensors.items():
            if key.startswith(f"{router}.") and tensor is not None:
                self._parameters[key].data = tensor


def _find_tensors(model: nn.Module, names: Sequence[str], buffers: bool) -> dict[str, torch.Tensor]:
    """Return the parameters of modules by name; with ``buffers`` also these, because a router may have a bias there."""
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        tensors |= dict(module.named_parameters(prefix=name))
        tensors |= dict(module.named_buffers(prefix=name)) if buffers else {}
    return tensors


def _take_kept(tensor: torch.Tensor, rows: Rows, unit: Unit, level: int) -> torch.Tensor:
    """Return the rows of a run that a level keeps; the tensor is in the order of removal."""
    by_group = tensor[rows.start : rows.start + rows.rows * unit.total].unflatten(0, (unit.num_groups, -1))
    return by_group[:, : unit.kept[level] * rows.rows // unit.num_groups].flatten(0, 1)


def _align(tensor: torch.Tensor) -> torch.Tensor:
    # a memory-mapped tensor may be unaligned, and kernels may round differently on it than on its replacements
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
