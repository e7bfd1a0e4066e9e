"""Costs: figures of an allocation that are known without running the model, and the notation for limits on them.

All costs are integers. Times are in nanoseconds and come from a latency table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from allocator.core.errors import UserError, did_you_mean
from allocator.core.space import Allocation, Cost, SearchSpace


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a cost counts.

    Attributes:
        label: Its name in words.
        scale: How many of the integers make one unit of the written figure, such as nanoseconds in a millisecond.
    """

    label: str
    scale: int = 1


COSTS: Mapping[Cost, Quantity] = {
    "params": Quantity("parameters"),
    "macs": Quantity("multiply-accumulates of matrices per token"),
    "prefill_macs": Quantity("multiply-accumulates of the prompt"),
    "decode_macs": Quantity("multiply-accumulates of the last decoded token"),
    "weight_bytes": Quantity("bytes of weights"),
    "kv_bytes": Quantity("bytes of the KV cache"),
    "prefill_ms": Quantity("milliseconds of the prompt", 10**6),
    "decode_ms": Quantity("milliseconds of a decoded token", 10**6),
    "latency_ms": Quantity("milliseconds of the prompt and all decoded tokens", 10**6),
}

_SUFFIXES = {
    "": 1,
    **{suffix: 10 ** (3 * power) for power, suffix in enumerate("KMGT", start=1)},
    **{f"{suffix}B": 10 ** (3 * power) for power, suffix in enumerate("KMGT", start=1)},
    **{f"{suffix}iB": 2 ** (10 * power) for power, suffix in enumerate("KMGT", start=1)},
}
_NAME, _AMOUNT = r"[a-z_]+(?:\.[A-Za-z0-9_-]+)?", r"[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_SHAPE = re.compile(rf"\s*({_NAME})\s*<=\s*({_AMOUNT})\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on a named figure, such as ``params <= 0.5x``.

    Attributes:
        name: The figure.
        amount: The bound.
        relative: Whether the amount is a share of the dense model's figure.
    """

    name: str
    amount: Fraction
    relative: bool

    @classmethod
    def parse(cls, text: str, known: Iterable[str]) -> Bound:
        """Read ``latency_ms <= 12``, ``kv_bytes <= 2GiB`` or ``params <= 0.5x``.

        Args:
            text: The bound.
            known: Names that may be bounded.

        Raises:
            UserError: The text has another form, or names an unknown figure.
        """
        match = _SHAPE.fullmatch(text)
        if match is None or (match[3] != "x" and match[3] not in _SUFFIXES):
            raise UserError(
                f"expected a bound such as 'params <= 0.5x', 'kv_bytes <= 2GiB' or 'latency_ms <= 12', found {text!r}"
            )
        if match[1] not in known:
            raise UserError(f"{text!r}: unknown figure {match[1]!r}{did_you_mean(match[1], known)}")
        return cls(match[1], Fraction(match[2]) * _SUFFIXES.get(match[3], 1), match[3] == "x")

    def limit(self, space: SearchSpace) -> int:
        """Return the largest cost of the whole model that keeps the bound.

        Raises:
            UserError: The space does not know the cost.
        """
        check_known(space, self.name)
        whole = space.cost(space.dense, self.name) if self.relative else COSTS[self.name].scale
        return floor(self.amount * whole)


def check_known(space: SearchSpace, cost: Cost) -> None:
    """Raise a UserError if a space lacks a cost: there is no latency table, or the model does not generate."""
    if cost not in space.fixed and COSTS[cost].scale == 1:
        raise UserError(
            f"{cost}: this model does not generate, and has no such cost. It has {', '.join(known_costs(space))}"
        )
    if cost not in space.fixed:
        raise UserError(
            f"{cost}: not known without a latency table. Make one with 'allocator latency --out table.json' "
            "and name it with --set workload.latency=table.json"
        )


def format_cost(cost: Cost, value: int) -> str:
    """Return a cost as text for people."""
    scale = COSTS[cost].scale
    return f"{value:,}" if scale == 1 else f"{value / scale:,.3f}"


def known_costs(space: SearchSpace) -> list[Cost]:
    """Return the costs that a space has, in the order of :data:`COSTS`."""
    return [cost for cost in COSTS if cost in space.fixed]


def to_units(cost: Cost, value: float) -> int:
    """Return the integer of a written figure. The inverse of :func:`from_units`."""
    return round(value * COSTS[cost].scale)


def costs_of(space: SearchSpace, allocation: Allocation) -> dict[Cost, float]:
    """Return all known costs of the whole model as written figures: times in milliseconds."""
    return {cost: from_units(cost, space.cost(allocation, cost)) for cost in known_costs(space)}


def from_units(cost: Cost, value: int) -> float:
    """Return the written figure of a cost: an integer, or milliseconds."""
    scale = COSTS[cost].scale
    return value if scale == 1 else value / scale
