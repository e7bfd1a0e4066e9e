"""What a plan keeps of every weight matrix, which is what other tools ask for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from allocator.core.errors import UserError
from allocator.core.plan import Plan
from allocator.core.space import Unit
from allocator.model.checkpoint.headers import ModelFiles
from allocator.model.family.layout import Layout, staying
from allocator.model.family.sub_blocks import Site


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a unit, and what a plan keeps of it.

    Attributes:
        module: Its module's name.
        unit: The plan's unit that decides.
        part: ``attention`` or ``mlp``.
        block: Index of the block.
        shape: Rows and columns in the dense model.
        kept_shape: Rows and columns that stay; (0, 0) where its unit is gone. Masks leave the dense shape.
        kept: Weights that stay.
        group: (n, m) where of every m consecutive weights of a row n stay, by an N:M plan; else None.
    """

    module: str
    unit: str
    part: str
    block: int
    shape: tuple[int, int]
    kept_shape: tuple[int, int]
    kept: int
    group: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Weights in the dense model."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of its weights that goes, in [0, 1]."""
        return 1.0 - self.kept / self.size

    @property
    def zeros(self) -> int:
        """Weights of the executed matrix that are masked."""
        return self.kept_shape[0] * self.kept_shape[1] - self.kept


def share(part: int, whole: int) -> float:
    """Return ``part / whole``, rounded up: who multiplies and rounds, to the nearest or down, has ``part`` again."""
    quotient = part / whole
    return quotient if Fraction(quotient) >= Fraction(part, whole) else math.nextafter(quotient, math.inf)


def matrices(
    plan: Plan, files: ModelFiles, layout: Layout, experts: Mapping[str, Collection[int]] = MappingProxyType({})
) -> tuple[Matrix, ...]:
    """Return the matrices of all units, in the order of blocks, and in a block of the family's file.

    Args:
        plan: A plan for the model.
        files: The dense model.
        layout: Where the plan's units are in it.
        experts: Numbers of the experts that stay, by unit: a plan says how many alone.

    Raises:
        UserError: A unit of whole experts loses some, and which is not said.
    """
    levels = {unit.name: (unit, level) for unit, level in zip(plan.space.units, plan.allocation, strict=True)}
    found: list[Matrix] = []
    for site in layout.sites:
        found += (
            _of_experts(site, *levels[site.name], experts, files) if site.experts else _of_site(site, levels, files)
        )
    return tuple(found)


def _of_experts(
    site: Site, unit: Unit, level: int, experts: Mapping[str, Collection[int]], files: ModelFiles
) -> Iterator[Matrix]:
    count = unit.kept[level]
    kept = range(count) if count in (0, unit.total) else experts.get(site.name)
    if kept is None or len(kept) != count:
        raise UserError(
            f"export: {site.name} keeps {count} of {unit.total} experts, and a plan does not say which. "
            "Make its checkpoint with 'allocator prune PLAN --out FOLDER', and name it with --checkpoint FOLDER"
        )
    whole = [(router, count) for router in site.rows]
    whole += [(module, files.shapes[f"{module}.weight"][0]) for number in kept for module in site.experts[number]]
    left = dict(whole)
    for module in site.modules:
        rows, columns = files.shapes[f"{module}.weight"]
        stays = (left[module], columns) if left.get(module) else (0, 0)
        yield Matrix(module, site.name, site.part, site.block, (rows, columns), stays, stays[0] * stays[1])


def _of_site(site: Site, levels: dict[str, tuple[Unit, int]], files: ModelFiles) -> Iterator[Matrix]:
    def shape(module: str) -> tuple[int, int]:
        rows, columns = files.shapes[f"{module}.weight"]
        return rows, columns

    if site.name not in levels or levels[site.name][0].kind == "matrix":
        for module in site.modules:
            unit, level = levels[module]
            kept, size = unit.kept[level], unit.total
            group = unit.group and level and (kept * unit.group // size, unit.group)
            yield Matrix(module, module, site.part, site.block, shape(module), shape(module), kept, group or None)
        return
    unit, level = levels[site.name]
    items, inputs = unit.kept[level], site.rows
    for module in _modules(site, files):
        rows, columns = shape(module)
        if items == 0:
            left = (0, 0)
        elif module == site.output:
            left = (rows, site.width * items)
        else:
            left = (inputs[module] * items if module in inputs else rows, columns)
        yield Matrix(module, site.name, site.part, site.block, (rows, columns), left, left[0] * left[1])


def _modules(site: Site, files: ModelFiles) -> list[str]:
    """Return the matrices of a sub-block, also those that stay as long as anything does (key and value of heads)."""
    return [*site.modules[:-1], *staying(site, files), site.output]
