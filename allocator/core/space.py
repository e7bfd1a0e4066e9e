"""The search space: the units that may be pruned, their levels, and the exact cost of each level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Any, TypeAlias

from allocator.core.files import check_name

Allocation: TypeAlias = tuple[int, ...]
"""One level per unit, in the order of :attr:`SearchSpace.units`. The genome."""

Cost: TypeAlias = str
"""Name of a figure that is known exactly without running the model; :mod:`allocator.core.costs` has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a model that receives one level.

    Attributes:
        name: Module name in the model, such as ``model.layers.0.mlp``.
        kind: What ``total`` and ``kept`` count: ``channels``, ``kv_groups``, ``query_heads``, ``experts``, or the
            weights of a ``matrix``.
        part: The side of its block, ``attention`` or ``mlp``.
        block: Index of its block.
        total: Channels, KV groups, query heads or weights in the dense unit.
        kept: How many items each level keeps, strictly decreasing; ``kept[0] == total``.
        params: Parameters at each level.
        macs: Multiply-accumulates of matrices per token at each level, as executed.
        group: Length of the runs of consecutive items of which each loses the same number: the M weights of an N:M
            pattern in row-major order, or the query heads of one KV group. None if any items may be removed.
        others: Further costs of each level by name, none of which rises with sparsity.
    """

    name: str
    kind: str
    part: str
    block: int
    total: int
    kept: tuple[int, ...]
    params: tuple[int, ...]
    macs: tuple[int, ...]
    group: int | None = None
    others: Mapping[Cost, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        assert {len(self.kept)} == {len(ladder) for ladder in (self.params, self.macs, *self.others.values())} != {0}
        assert self.kept[0] == self.total, f"{self.name}: level 0 must be dense"
        assert all(a > b for a, b in zip(self.kept, self.kept[1:], strict=False)), f"{self.name}: {self.kept}"
        if self.group is not None:
            assert self.total % self.group == 0, f"{self.name}: {self.total} in groups of {self.group}"
            assert not any(count % self.num_groups for count in self.kept), f"{self.name}: {self.kept}"

    @property
    def num_groups(self) -> int:
        """Number of runs of items that lose the same number each; 1 if any items may be removed."""
        return 1 if self.group is None else self.total // self.group

    @property
    def num_levels(self) -> int:
        """Length of the ladder, the dense level included."""
        return len(self.kept)

    def costs(self, cost: Cost) -> tuple[int, ...]:
        """Return one cost of every level."""
        if cost == "params":
            return self.params
        return self.macs if cost == "macs" else self.others[cost]

    def sparsity(self, level: int) -> float:
        """Return the share of the unit that a level removes, in [0, 1]."""
        return 1.0 - self.kept[level] / self.total


@dataclass(frozen=True)
class SearchSpace:
    """The units of one model with their ladders, and the exact cost of everything else.

    Attributes:
        pattern: ``structured``, ``unstructured`` or ``n:m``.
        units: In model order.
        fixed: Cost outside units (embeddings, norms, head), for every known cost.
    """

    pattern: str
    units: tuple[Unit, ...]
    fixed: Mapping[str, int]

    @cached_property
    def dense(self) -> Allocation:
        """The allocation that removes nothing."""
        return (0,) * len(self.units)

    @cached_property
    def sparsest(self) -> Allocation:
        """The allocation with every unit at its last level."""
        return tuple(unit.num_levels - 1 for unit in self.units)

    @cached_property
    def unit_params(self) -> int:
        """Parameters inside units of the dense model. ``--target`` is a share of them."""
        return sum(unit.params[0] for unit in self.units)

    def cost(self, allocation: Sequence[int], cost: Cost = "params") -> int:
        """Return the exact cost of the whole model under ``allocation``."""
        assert len(allocation) == len(self.units)
        return self.fixed[cost] + sum(u.costs(cost)[level] for u, level in zip(self.units, allocation, strict=True))

    def compute_share(self, allocation: Sequence[int]) -> float:
        """Return the share of the dense forward's multiply-accumulates that an allocation computes."""
        return self.cost(allocation, "macs") / self.cost(self.dense, "macs")

    def sparsity(self, allocation: Sequence[int]) -> float:
        """Return the share of the parameters inside units that an allocation removes."""
        return 1.0 - (self.cost(allocation) - self.fixed["params"]) / self.unit_params

    def limit_for(self, target: float) -> int:
        """Return the parameter limit of the whole model that removes at least ``target`` of the units."""
        # as a fraction of decimals: 1 - 0.9 is not 0.1 in floating point, and billions show it
        return self.fixed["params"] + floor((1 - Fraction(str(target))) * self.unit_params)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_json` reads back."""
        return {"pattern": self.pattern, "fixed": dict(self.fixed), "units": [asdict(u) for u in self.units]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Read what :meth:`to_json` wrote.

        Raises:
            UserError: The name of a unit is a path, not a name.
        """
        for unit in data["units"]:
            check_name(unit["name"], "search space")
        units = tuple(
            Unit(
                name=unit["name"],
                kind=unit["kind"],
                part=unit["part"],
                block=unit["block"],
                total=unit["total"],
                kept=tuple(unit["kept"]),
                params=tuple(unit["params"]),
                macs=tuple(unit["macs"]),
                group=unit["group"],
                others={cost: tuple(ladder) for cost, ladder in unit.get("others", {}).items()},
            )
            for unit in data["units"]
        )
        return cls(pattern=data["pattern"], units=units, fixed=dict(data["fixed"]))
