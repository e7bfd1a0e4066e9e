"""What it costs that widths are multiples: the ladders of ``ladder.align`` beside those without it."""

from __future__ import annotations

from typing import Any

from allocator.core.budget import Budget, fits
from allocator.core.costs import from_units
from allocator.core.space import SearchSpace, Unit
from allocator.run.config.run import RunConfig
from allocator.run.model import read_model
from allocator.searchers.rules.baselines import uniform


def alignment(config: RunConfig, space: SearchSpace, budget: Budget) -> dict[str, Any]:
    """Return what aligned ladders lack; nothing for a configuration that aligns nothing.

    Args:
        config: With ``ladder.align``.
        space: Its search space.
        budget: What uniform keeps in it.

    Returns:
        ``multiple``; ``parts``, for each part with channels the ``levels`` of its shortest ladder, how many they are
        ``unaligned``, and ``furthest``: how far at most a sparsity of an unaligned ladder is from the nearest on the
        aligned one, in [0, 1]; ``unused``, for each cost that is bounded what uniform leaves of the budget,
        ``aligned`` and ``unaligned``, the latter None if the unaligned ladders do not reach the budget.
    """
    aligned = [place for place, unit in enumerate(space.units) if unit.kind == "channels"]
    if config.ladder.align == 1 or config.pattern != "structured" or not aligned:
        return {}
    _, _, free = read_model(config.model_copy(update={"ladder": config.ladder.model_copy(update={"align": 1})}))
    parts: dict[str, list[tuple[Unit, Unit]]] = {}
    for place in aligned:
        parts.setdefault(space.units[place].part, []).append((space.units[place], free.units[place]))
    even = uniform(space, budget)
    even_free = uniform(free, budget) if fits(free, free.sparsest, budget) else None
    return {
        "multiple": config.ladder.align,
        "parts": {
            part: {
                "levels": min(unit.num_levels for unit, _ in pairs),
                "unaligned": min(other.num_levels for _, other in pairs),
                "furthest": round(max(_furthest(unit, other) for unit, other in pairs), 6),
            }
            for part, pairs in parts.items()
        },
        "unused": {
            cost: {
                "aligned": from_units(cost, limit - space.cost(even, cost)),
                "unaligned": None if even_free is None else from_units(cost, limit - free.cost(even_free, cost)),
            }
            for cost, limit in budget.limits.items()
        },
    }


def _furthest(unit: Unit, other: Unit) -> float:
    """Return how far at most a level of the other ladder is from the nearest of the unit's, as a share of the unit."""
    return max(min(abs(count - kept) for kept in unit.kept) for count in other.kept) / unit.total
