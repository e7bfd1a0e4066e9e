"""From compact levels to weights: assembled for a checkpoint, or switched in place in a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from allocator.core.space import SearchSpace, Unit
from allocator.model.checkpoint import Replacements, read_tensors
from allocator.model.family import Layout, Site
from allocator.model.headers import ModelFiles
from allocator.model.modeling_pruned import regroup, remove
from allocator.prune.masks import sparse_weight
from allocator.prune.structured import item_columns

CompactLevels = Mapping[str, torch.Tensor]
"""What a local pruner returns for one unit, and a level store keeps."""


class Assembler:
    """Makes the weights of any unit at any level.

    Rows of structured units are permuted once into the order of removal, so every level of them is a prefix:
    a view, not a copy. Only output projections differ per level.
    """

    def __init__(
        self,
        files: ModelFiles,
        layout: Layout,
        space: SearchSpace,
        compact: Callable[[str], CompactLevels],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Read the dense tensors of units lazily.

        Args:
            files: The dense model.
            layout: Where its units are.
            space: Their ladders.
            compact: Returns a unit's compact levels by its name.
            dtype: Data type of the result; None for the checkpoint's own.
        """
        self._files, self._compact, self._dtype = files, compact, dtype
        self._units = {unit.name: unit for unit in space.units}
        self._sites = {site.name: site for site in layout.sites}
        self._members = {
            site.name: [u for u in space.units if u.name == site.name or u.name in site.modules]
            for site in layout.sites
        }
        self._dense: dict[str, dict[str, torch.Tensor]] = {}
        self._ordered: dict[str, dict[str, torch.Tensor]] = {}

    def unit(self, name: str, level: int) -> Replacements:
        """Return every tensor of a unit at a level, by parameter name; None for what is gone."""
        unit = self._units[name]
        dense = self._dense_tensors(name)
        if level == 0:
            return dense
        if unit.kind == "matrix":
            weight = f"{name}.weight"
            return {**dense, weight: sparse_weight(self._compact(name), level, dense[weight])}
        if unit.kept[level] == 0:
            return dict.fromkeys(dense)
        return self._prefix(self._sites[name], unit, level, dense)

    def site(self, name: str, levels: Mapping[str, int]) -> Replacements:
        """Return every tensor of a sub-block, whose units are at ``levels``."""
        tensors: dict[str, torch.Tensor | None] = {}
        for unit in self._members[name]:
            tensors.update(self.unit(unit.name, levels[unit.name]))
        return tensors

    def _dense_tensors(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._dense:
            names = [key for key in self._files.shapes if key.startswith(f"{name}.")]
            tensors = read_tensors(self._files, names)
            self._dense[name] = {key: self._cast(tensor) for key, tensor in tensors.items()}
        return self._dense[name]

    def _prefix(self, site: Site, unit: Unit, level: int, dense: Mapping[str, torch.Tensor]) -> Replacements:
        compact = self._compact(site.name)
        if site.name not in self._ordered:
            ordered: dict[str, torch.Tensor] = {}
            for module, rows in site.inputs:
                picked = item_columns(compact["order"].long(), rows)
                for key in (f"{module}.weight", f"{module}.bias"):
                    if key in dense:
                        ordered[key] = dense[key][picked]
            self._ordered[site.name] = ordered
        tensors: dict[str, torch.Tensor | None] = dict(dense)
        groups = unit.total // unit.group if unit.group else 1
        for module, rows in site.inputs:
            for key in (f"{module}.weight", f"{module}.bias"):
                if key in dense:
                    # a view where there is one group
                    by_group = self._ordered[site.name][key].unflatten(0, (groups, -1))
                    tensors[key] = by_group[:, : unit.kept[level] * rows // groups].flatten(0, 1)
        tensors[f"{site.output}.weight"] = self._cast(compact[f"output.{level}"])
        if f"bias.{level}" in compact:
            key, lost = f"{site.output}.bias", self._cast(compact[f"bias.{level}"])
            tensors[key] = dense[key] + lost if key in dense else lost
        return tensors

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        # clone: memory-mapped tensors may be unaligned, and kernels may then round differently
        return tensor.clone() if self._dtype in (None, tensor.dtype) else tensor.to(self._dtype)


class Switchboard:
    """Switches units of a live model between levels, in place."""

    def __init__(self, model: nn.Module, layout: Layout, assembler: Assembler) -> None:
        """Take over a dense model."""
        self._model, self._assembler = model, assembler
        self._parts = {site.name: site.part for site in layout.sites}
        self._outputs = {site.name: site.output for site in layout.sites}
        self._originals = {site.name: model.get_submodule(site.name) for site in layout.sites}
        self._levels: dict[str, int] = {}

    def set(self, name: str, level: int) -> None:
        """Put a unit at a level; nothing happens if it is there."""
        if self._levels.get(name, 0) == level:
            return
        tensors = self._assembler.unit(name, level)
        if all(tensor is None for tensor in tensors.values()):
            remove(self._model, name, self._parts[name])
        else:
            if name in self._originals:
                self._model.set_submodule(name, self._originals[name])
            for key, tensor in tensors.items():
                assert tensor is not None
                module, _, attribute = key.rpartition(".")
                setattr(self._model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
            if name in self._originals:
                regroup(self._originals[name])
                if f"{self._outputs[name]}.bias" not in tensors:
                    self._model.get_submodule(self._outputs[name]).register_parameter("bias", None)
        self._levels[name] = level
