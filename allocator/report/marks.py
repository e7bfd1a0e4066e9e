"""The points that figures mark: all candidates of a front, its uniform starts, and the allocations that have a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.outcomes import Figures, collect_figures, final_request, select_comparable
from allocator.core.space import Allocation, SearchSpace, Unit

NAMED = ("uniform", "two_rate", "searched")
"""Allocations that ``result.json`` records unit by unit."""


def collect_candidates(journal: Journal) -> list[Figures]:
    """Return the figures of every outcome that the front was chosen from."""
    return [collect_figures(journal, outcome) for outcome in select_comparable(journal)]


def collect_starts(journal: Journal) -> list[Figures]:
    """Return the figures of the uniform allocations with which a search of a front begins; none for other searches."""
    if not journal.header.objectives or not journal.batches:
        return []
    return [collect_figures(journal, outcome) for outcome in journal.batches[0] if not outcome.failed]


def restore_allocations(space: SearchSpace, units: Iterable[Mapping[str, Any]]) -> dict[str, Allocation]:
    """Restore the named allocations of ``result.json`` in the search space.

    Args:
        space: The space that was searched.
        units: The ``units`` of a result: ``name``, and ``sparsity`` by the name of an allocation.

    Raises:
        UserError: The result has other units than the space.
    """
    recorded = {unit["name"]: unit["sparsity"] for unit in units}
    if set(recorded) != {unit.name for unit in space.units}:
        raise UserError(
            "result.json: its units are not those of journal.jsonl, so the files are of two runs. "
            "Restore the one that was replaced, or run the search again"
        )
    named = [name for name in NAMED if all(name in sparsities for sparsities in recorded.values())]
    return {name: tuple(_nearest_level(unit, recorded[unit.name][name]) for unit in space.units) for name in named}


def collect_marks(journal: Journal, named: Mapping[str, Allocation]) -> dict[str, Figures]:
    """Return the figures of the named allocations that were measured on the same text as the front."""
    outcomes = {name: journal.measured(final_request(journal, allocation)) for name, allocation in named.items()}
    return {name: collect_figures(journal, outcome) for name, outcome in outcomes.items() if outcome is not None}


def _nearest_level(unit: Unit, sparsity: float) -> int:
    return min(range(unit.num_levels), key=lambda level: abs(unit.sparsity(level) - sparsity))
