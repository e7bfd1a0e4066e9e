"""Numbers as text, for tables and the page."""

from __future__ import annotations

from collections.abc import Mapping

from allocator.core.costs import COSTS
from allocator.core.space import Cost

_NONE = "—"


_MINUS = "\N{MINUS SIGN}"


def format_figure(name: str, value: float) -> str:
    """Format a cost in the unit in which users write it, or a measurement."""
    if name not in COSTS:
        return format_number(value, 4)
    return format_count(int(value)) if COSTS[name].scale == 1 else format_number(value, 3)


def format_point(figures: Mapping[str, float]) -> str:
    """Format several figures with their names."""
    return ", ".join(f"{name} {format_figure(name, value)}" for name, value in figures.items())


def format_count(value: int | None) -> str:
    """Format an integer with thousands separators."""
    return _NONE if value is None else f"{value:,}"


def format_number(value: float | None, digits: int) -> str:
    """Format a figure; a large one without decimals."""
    if value is None:
        return _NONE
    return f"{value:,.{digits}f}" if abs(value) < 10_000 else f"{value:,.0f}"


def format_share(value: float | None, digits: int = 2) -> str:
    """Format a share in [0, 1] as a percentage."""
    return _NONE if value is None else f"{value:.{digits}%}"


def format_change(value: float | None) -> str:
    """Format a relative difference as a signed percentage."""
    if value is None:
        return _NONE
    text = f"{abs(value):.1%}"
    sign = "" if text == "0.0%" else "+" if value > 0 else _MINUS
    return sign + text


def format_plural(amount: int, noun: str) -> str:
    """Format a count of things: ``1 unit``, ``2 units``."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def format_budget(limits: Mapping[Cost, float]) -> str:
    """Format a budget, given in the units in which users write it."""
    return " and ".join(f"{cost} <= {format_figure(cost, limit)}" for cost, limit in limits.items())
