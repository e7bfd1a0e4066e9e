"""Tables of a model before any search: its matrices, its search space, and its latencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.markup import escape
from rich.table import Table

from allocator.core.costs import format_cost
from allocator.core.latency import LatencyTable, Timing
from allocator.core.space import SearchSpace, Unit
from allocator.report.tables.base import make_table
from allocator.report.tables.formats import format_count, format_figure, format_plural, format_share


def space_table(space: SearchSpace) -> Table:
    """Return one line per unit: its kind, the counts that its levels keep, and its dense parameters."""
    table = make_table(f"{space.pattern} search space: {format_plural(len(space.units), 'unit')}")
    table.add_column("unit", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("kept at each level", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for unit in space.units:
        table.add_row(
            escape(unit.name), unit.kind, format_count(unit.total), format_ladder(unit), format_count(unit.params[0])
        )
    table.add_section()
    table.add_row("embeddings, norms, head", "fixed", "", "", format_count(space.fixed["params"]))
    table.add_row("whole model", "", "", "", format_count(space.cost(space.dense)), style="bold")
    return table


def format_undivided(space: SearchSpace) -> str | None:
    """Format which units are removed only as a whole; None where every unit can lose a part."""
    parts = sorted({unit.part for unit in space.units if unit.kind != "matrix" and unit.total == 1})
    if not parts:
        return None
    return f"{' and '.join(parts)} is removed as a whole or not at all: no part of it can be removed without the rest"


def coverage_table(rows: Iterable[tuple[str, Sequence[int], int, str | None]]) -> Table:
    """Return one line per matrix of a model: its name, shape, number of blocks, and what covers it."""
    table = make_table("matrices of the model")
    table.add_column("module", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    table.add_column("covered by", no_wrap=True)
    for module, shape, times, by in rows:
        style = "bold red" if by is None else None
        table.add_row(
            escape(module), " x ".join(map(format_count, shape)), format_count(times), by or "nothing", style=style
        )
    return table


def format_alignment(lack: Mapping[str, Any]) -> str:
    """Format in two lines what aligned ladders lack, compared with ladders of any width."""
    parts = "; ".join(
        f"{part} has {own['levels']} levels of {own['unaligned']}, "
        f"at most {format_share(own['furthest'])} of its channels away"
        for part, own in lack["parts"].items()
    )
    unused = "; ".join(
        f"{cost} {format_figure(cost, left['aligned'])} "
        f"({'out of reach' if left['unaligned'] is None else format_figure(cost, left['unaligned'])} with align 1)"
        for cost, left in lack["unused"].items()
    )
    return f"align {lack['multiple']}: {parts} from those of align 1\nuniform leaves unused: {unused}"


def latency_table(table: LatencyTable) -> Table:
    """Return the time that a sub-block of each shape takes, by the number of items that it keeps."""
    made = make_table(f"{', '.join(table.device.values())}: milliseconds, batch {table.settings.batch}")
    made.add_column("sub-block")
    for heading in ("kept", f"prefill of {table.settings.prompt}", "decoded token", "spread"):
        made.add_column(heading, justify="right", no_wrap=True)

    def row(name: str, kept: str, timing: Timing) -> None:
        times = (format_cost("latency_ms", timing.prefill_ns), format_cost("latency_ms", timing.decode_ns))
        made.add_row(name, kept, *times, format_share(timing.spread, 0))

    row("outside sub-blocks", "", table.fixed)
    for shape, timings in table.units.items():
        for index, timing in enumerate(timings):
            row("" if index else escape(shape), format_count(timing.kept), timing)
    return made


def format_ladder(unit: Unit) -> str:
    """Format the counts that the levels of a unit keep; a long ladder is shortened."""
    kept = unit.kept
    steps = {a - b for a, b in pairwise(kept)}
    if len(kept) <= 5:
        return " ".join(map(str, kept))
    if len(steps) == 1:
        return f"{kept[0]} .. {kept[-1]} by {steps.pop()}"
    if unit.kind == "matrix":
        return f"{format_share(kept[1] / kept[0], 0)} .. {format_share(kept[-1] / kept[0], 0)}, {len(kept)} levels"
    return f"{kept[0]} {kept[1]} .. {kept[-1]}, {len(kept)} levels"
