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
"""Memory for output projections that are kept ready; beyond it those not used for longest are read again."""

_ALIGNMENT = 64


class Assembler:
    """Makes the weights of any unit at any level.

    A dense tensor is held once. Rows of a structured unit lie in the checkpoint's order while it is dense; when it
    is pruned they are permuted into the order of removal, so that every level of them is a prefix: a view, not a
    copy. Only output projections differ per level.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        space: SearchSpace,
        compact: Callable[[str], CompactLevels],
        model: nn.Module | None = None,
    ) -> None:
        """Take the dense tensors of units from a live model, or read them lazily.

        Args:
            checkpoint: The dense model.
            layout: Where its units are.
            space: Their ladders.
            compact: Returns a unit's compact levels by its name.
            model: A dense model, whose data type and device results get; None for a checkpoint as it is on disk.
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
                own = _tensors(model, self._modules_removed(name), buffers=unit.kind == "experts")
                for parameter in own.values():
                    parameter.data = _aligned(parameter.data)
                self._dense[name] = {key: parameter.detach() for key, parameter in own.items()}

    def unit(self, name: str, level: int) -> Replacements:
        """Return every tensor of a unit at a level, by parameter name; None for what is gone."""
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
            return dict(dense) if level == 0 else self._chosen(self._sub_blocks[name], unit, level, dense)
        if (level > 0) != (name in self._permuted):
            self._permute(self._sub_blocks[name], dense)
        return dict(dense) if level == 0 else self._prefix(self._sub_blocks[name], unit, level, dense)

    def wide(self, name: str, level: int) -> dict[str, torch.Tensor]:
        """Return every tensor of a unit at a level in the shapes of the dense one, whose outputs are the same.

        Whole experts have no such form: fewer rows of a router are another choice. A structured unit's rows are in the
        order of removal, and its output projection is zero where it reads what is removed. So the weights of two levels
        can be subtracted.
        """
        unit = self._units[name]
        dense = self._dense_tensors(name)
        if unit.kind == "matrix":
            return {key: tensor for key, tensor in self.unit(name, level).items() if tensor is not None}
        sub_block, compact = self._sub_blocks[name], self._compact(name)
        if name not in self._permuted:
            self._permute(sub_block, dense)
        key = f"{sub_block.output}.weight"
        whole_oi = dense[key]
        if level == 0:
            order = item_columns(compact["order"].long(), sub_block.width)
            return {**dense, key: whole_oi[:, order.to(whole_oi.device)]}
        if unit.kept[level] == 0:
            output = f"{sub_block.output}."
            gone = {name: torch.zeros_like(tensor) for name, tensor in dense.items() if name.startswith(output)}
            return {**dense, **gone}
        written = self._written(sub_block, level, dense)
        by_group = written[key].unflatten(1, (unit.num_groups, -1))
        lost = whole_oi.shape[1] // unit.num_groups - by_group.shape[2]
        return {**dense, **written, key: functional.pad(by_group, (0, lost)).flatten(1)}

    def whole(self, name: str) -> bool:
        """Whether a sub-block is a unit, and not its matrices."""
        return name in self._units and self._units[name].kind != "matrix"

    def sub_block(self, name: str, levels: Mapping[str, int]) -> Replacements:
        """Return every tensor of a sub-block, whose units are at ``levels``."""
        tensors: dict[str, torch.Tensor | None] = {}
        for unit in self._members[name]:
            tensors.update(self.unit(unit.name, levels[unit.name]))
        return tensors

    def _modules_removed(self, name: str) -> tuple[str, ...]:
        """Return the modules that a unit consists of."""
        return (name,) if self._units[name].kind == "matrix" else self._sub_blocks[name].modules_removed

    def _chosen(self, sub_block: SubBlock, unit: Unit, level: int, dense: Mapping[str, torch.Tensor]) -> Replacements:
        """Return the tensors of the experts that stay, and their rows of the router."""
        by_group = self._compact(sub_block.name)["order"].long().view(unit.num_groups, -1)
        kept = by_group[:, : unit.kept[level] // unit.num_groups].flatten().sort().values
        stay = {module for number in kept.tolist() for module in sub_block.experts[number]}
        whole = {module for expert in sub_block.experts for module in expert}
        return {
            key: (dense[key] if module in stay else None) if module in whole else dense[key][kept.to(dense[key].device)]
            for key in dense
            for module in (key.rpartition(".")[0],)
        }

    def _dense_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._dense:
            inside = tuple(f"{root}." for root in self._modules_removed(name))
            names = [key for key in self._checkpoint.shapes if key.startswith(inside)]
            self._dense[name] = {key: _aligned(tensor) for key, tensor in read_tensors(self._checkpoint, names).items()}
        return self._dense[name]

    def _permute(self, sub_block: SubBlock, dense: dict[str, torch.Tensor]) -> None:
        """Put rows into the order of removal, or back into the checkpoint's."""
        order = self._compact(sub_block.name)["order"].long()
        items = order.argsort() if sub_block.name in self._permuted else order
        for module in sub_block.rows:
            runs = [own.start + item_columns(items, own.rows) for own in sub_block.inputs if own.module == module]
            picked = torch.cat(runs)
            for key in (f"{module}.weight", f"{module}.bias"):
                if key in dense:
                    dense[key] = dense[key][picked.to(dense[key].device)]
        self._permuted ^= {sub_block.name}

    def _prefix(self, sub_block: SubBlock, unit: Unit, level: int, dense: Mapping[str, torch.Tensor]) -> Replacements:
        tensors = {**dense, **self._written(sub_block, level, dense)}
        for module in sub_block.rows:
            for key in (f"{module}.weight", f"{module}.bias"):
                if key in dense:
                    # a view where there is one group and one run of rows
                    runs = [_kept(dense[key], own, unit, level) for own in sub_block.inputs if own.module == module]
                    tensors[key] = runs[0] if len(runs) == 1 else torch.cat(runs)
        return tensors

    def _written(self, sub_block: SubBlock, level: int, dense: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what pruning writes anew: the output projection, and a bias that stands for what is lost."""
        compact, output = self._compact(sub_block.name), dense[f"{sub_block.output}.weight"]
        tensors = {f"{sub_block.output}.weight": self._output(sub_block.name, level, output)}
        if f"bias.{level}" in compact:
            key, lost = f"{sub_block.output}.bias", compact[f"bias.{level}"].to(output.device, output.dtype, copy=True)
            tensors[key] = dense[key] + lost if key in dense else lost
        return tensors

    def _output(self, name: str, level: int, like: torch.Tensor) -> torch.Tensor:
        """Return an output projection at a level, in the data type and on the device of the dense one."""
        found = self._outputs.pop((name, level), None)
        if found is None:
            found = self._compact(name)[f"output.{level}"].to(like.device, like.dtype, copy=True)
            self._room -= found.nbytes
        self._outputs[name, level] = found
        while self._room < 0:
            self._room += self._outputs.popitem(last=False)[1].nbytes
        return found


class LevelSwitch:
    """Switches units of a live model between levels, in place."""

    def __init__(self, model: nn.Module, layout: Layout, assembler: Assembler) -> None:
        """Take over a dense model."""
        self._model, self._assembler = model, assembler
        # those that are units; the others never lose a module, nor an item
        self._sub_blocks = {
            sub_block.name: sub_block for sub_block in layout.sub_blocks if assembler.whole(sub_block.name)
        }
        self._originals = {
            root: model.get_submodule(root)
            for sub_block in self._sub_blocks.values()
            for root in sub_block.modules_removed
        }
        self._parents = {name: model.get_submodule(sub_block.parent) for name, sub_block in self._sub_blocks.items()}
        self._counts = {
            name: counted(self._parents[name], sub_block.counts) for name, sub_block in self._sub_blocks.items()
        }
        self._parameters: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._levels: dict[str, tuple[int, bool] | None] = {}

    def set(self, name: str, level: int, wide: bool = False) -> None:
        """Put a unit at a level, ``wide`` in dense shapes where it has such; nothing happens if it is there."""
        wide = wide and not (name in self._sub_blocks and self._sub_blocks[name].experts)
        if self._levels.get(name, (0, False)) == (level, wide):
            return
        self._put(name, self._assembler.wide(name, level) if wide else self._assembler.unit(name, level))
        self._levels[name] = (level, wide)

    def blend(self, name: str, shares: Sequence[float]) -> None:
        """Put a unit, in dense shapes, at a weighted mean of its levels.

        What a structured unit adds is linear in its output projection, whose inputs are those of the dense unit: at the
        mean of its levels it adds the mean of what they add.
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
            for root, part in self._sub_blocks[name].removal.items():
                remove(self._model, root, part)
        else:
            sub_block = self._sub_blocks.get(name)
            for root in () if sub_block is None else sub_block.modules_removed:
                self._model.set_submodule(root, self._originals[root])
            for key, tensor in tensors.items():
                assert tensor is not None
                # what is not there yet is a bias that pruning adds
                self._parameters.setdefault(key, nn.Parameter(tensor, requires_grad=False)).data = tensor
            if sub_block is not None:
                regroup(self._parents[name])
                project, kept = self._model.get_submodule(sub_block.output), tensors[f"{sub_block.output}.weight"]
                assert kept is not None
                recount(self._parents[name], self._counts[name], kept.shape[1] // sub_block.width, sub_block.total)
                bias = f"{sub_block.output}.bias"
                project.register_parameter("bias", self._parameters[bias] if bias in tensors else None)

    def _choose(self, sub_block: SubBlock, tensors: Replacements) -> None:
        """Have a router choose from some experts."""
        (router,) = sub_block.rows
        kept = [
            number for number, (module, *_) in enumerate(sub_block.experts) if tensors[f"{module}.weight"] is not None
        ]
        choose(self._model, sub_block.name, router, kept, self._originals[sub_block.name], self._originals[router])
        for key, tensor in tensors.items():
            if key.startswith(f"{router}.") and tensor is not None:
                self._parameters[key].data = tensor


def _tensors(model: nn.Module, names: Sequence[str], buffers: bool) -> dict[str, torch.Tensor]:
    """Return parameters of modules by name, and ``buffers``: a router may keep a bias in one."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        found |= dict(module.named_parameters(prefix=name))
        found |= dict(module.named_buffers(prefix=name)) if buffers else {}
    return found


def _kept(tensor: torch.Tensor, own: Rows, unit: Unit, level: int) -> torch.Tensor:
    """Return the rows of a run, in the order of removal, that a level keeps."""
    by_group = tensor[own.start : own.start + own.rows * unit.total].unflatten(0, (unit.num_groups, -1))
    return by_group[:, : unit.kept[level] * own.rows // unit.num_groups].flatten(0, 1)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    # memory-mapped tensors may be unaligned, and kernels may then round differently from what is switched in later
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
