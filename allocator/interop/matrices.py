"""What a plan keeps of every weight matrix; other tools take plans in these terms."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from allocator.core.errors import UserError
from allocator.core.plan import Plan
from allocator.core.space import Unit
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout, retained_matrices
from allocator.model.family.sub_blocks import SubBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix of a unit, and what a plan keeps of it.

    Attributes:
        module: The name of its module.
        unit: The unit of the plan that it belongs to.
        part: ``attention`` or ``mlp``.
        block: Index of the block.
        shape: Rows and columns in the dense model.
        kept_shape: Rows and columns that stay; (0, 0) where the unit is removed. Masks leave the dense shape.
        kept: Number of weights that stay.
        group: (n, m) for an N:M plan, where n of every m consecutive weights of a row stay; otherwise None.
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
        """Number of weights in the dense model."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of its weights that is removed, in [0, 1]."""
        return 1.0 - self.kept / self.size

    @property
    def zeros(self) -> int:
        """Number of masked weights in the executed matrix."""
        return self.kept_shape[0] * self.kept_shape[1] - self.kept


def round_share_up(part: int, whole: int) -> float:
    """Return ``part / whole``, rounded up, so that its product with ``whole`` is ``part`` also when rounded down."""
    quotient = part / whole
    return quotient if Fraction(quotient) >= Fraction(part, whole) else math.nextafter(quotient, math.inf)


def list_matrices(
    plan: Plan, checkpoint: Checkpoint, layout: Layout, experts: Mapping[str, Collection[int]] = MappingProxyType({})
) -> tuple[Matrix, ...]:
    """List the matrices of all units, block by block, in the order of the family's file.

    Args:
        plan: A plan for the model.
        checkpoint: The dense model.
        layout: The places of the plan's units in the model.
        experts: Numbers of the experts that stay, by unit; a plan has only their count.

    Raises:
        UserError: A unit loses some of its experts, and ``experts`` does not tell which.
    """
    levels = {unit.name: (unit, level) for unit, level in zip(plan.space.units, plan.allocation, strict=True)}
    matrices: list[Matrix] = []
    for sub_block in layout.sub_blocks:
        matrices += (
            _list_expert_matrices(sub_block, *levels[sub_block.name], experts, checkpoint)
            if sub_block.experts
            else _list_sub_block_matrices(sub_block, levels, checkpoint)
        )
    return tuple(matrices)


def _list_expert_matrices(
    sub_block: SubBlock, unit: Unit, level: int, experts: Mapping[str, Collection[int]], checkpoint: Checkpoint
) -> Iterator[Matrix]:
    count = unit.kept[level]
    kept = range(count) if count in (0, unit.total) else experts.get(sub_block.name)
    if kept is None or len(kept) != count:
        raise UserError(
            f"export: {sub_block.name} keeps {count} of {unit.total} experts, and a plan does not say which. "
            "Make its checkpoint with 'allocator prune PLAN --out FOLDER', and name it with --checkpoint FOLDER"
        )
    whole = [(router, count) for router in sub_block.rows]
    whole += [
        (module, checkpoint.shapes[f"{module}.weight"][0]) for number in kept for module in sub_block.experts[number]
    ]
    left = dict(whole)
    for module in sub_block.modules:
        rows, columns = checkpoint.shapes[f"{module}.weight"]
        stays = (left[module], columns) if left.get(module) else (0, 0)
        yield Matrix(
            module=module,
            unit=sub_block.name,
            part=sub_block.part,
            block=sub_block.block,
            shape=(rows, columns),
            kept_shape=stays,
            kept=stays[0] * stays[1],
        )


def _list_sub_block_matrices(
    sub_block: SubBlock, levels: dict[str, tuple[Unit, int]], checkpoint: Checkpoint
) -> Iterator[Matrix]:
    def shape(module: str) -> tuple[int, int]:
        rows, columns = checkpoint.shapes[f"{module}.weight"]
        return rows, columns

    if sub_block.name not in levels or levels[sub_block.name][0].kind == "matrix":
        for module in sub_block.modules:
            unit, level = levels[module]
            kept, size = unit.kept[level], unit.total
            group = unit.group and level and (kept * unit.group // size, unit.group)
            yield Matrix(
                module=module,
                unit=module,
                part=sub_block.part,
                block=sub_block.block,
                shape=shape(module),
                kept_shape=shape(module),
                kept=kept,
                group=group or None,
            )
        return
    unit, level = levels[sub_block.name]
    items, inputs = unit.kept[level], sub_block.rows
    for module in _list_modules(sub_block, checkpoint):
        rows, columns = shape(module)
        if items == 0:
            left = (0, 0)
        elif module == sub_block.output:
            left = (rows, sub_block.width * items)
        else:
            left = (inputs[module] * items if module in inputs else rows, columns)
        yield Matrix(
            module=module,
            unit=sub_block.name,
            part=sub_block.part,
            block=sub_block.block,
            shape=(rows, columns),
            kept_shape=left,
            kept=left[0] * left[1],
        )


def _list_modules(sub_block: SubBlock, checkpoint: Checkpoint) -> list[str]:
    """List the matrices of a sub-block, including those that are never cut in part (key and value of heads)."""
    return [*sub_block.modules[:-1], *retained_matrices(sub_block, checkpoint), sub_block.output]
