"""The table of a comparison of rules and plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from allocator.report.tables.base import make_table
from allocator.report.tables.formats import format_budget, format_change, format_count, format_number, format_share
from allocator.report.tables.result import _format_caption, _format_scores, find_distance, list_headings


def comparison_table(data: Mapping[str, Any]) -> Table:
    """Return the measurements of a comparison: dense, then rules and plans by their distance from dense."""
    measured: Mapping[str, Mapping[str, Any]] = data["measured"]
    base, columns = find_distance(measured["uniform"]), list_headings(measured)
    table = make_table(f"{data['model']['id']}, {data['pattern']}, {data['asked']}")
    table.add_column("")
    for heading in ("parameters", "removed", *columns, "vs uniform"):
        table.add_column(heading, justify="right")
    for name in sorted(measured, key=lambda name: (name != "dense", find_distance(measured[name]), name)):
        figures = measured[name]
        away = find_distance(figures)
        versus = away / base - 1.0 if base and away is not None and name not in ("dense", "uniform") else None
        table.add_row(
            escape(name) + ("" if figures["within_budget"] else " *"),
            format_count(figures["params"]),
            format_share(figures["sparsity"]),
            *_format_scores(columns, figures.get("perplexity"), figures.get("accuracy")),
            format_number(away, 4),
            format_change(versus),
            style="bold" if name.startswith("plan ") else None,
        )
    table.caption = _format_caption(columns)
    if not all(figures["within_budget"] for figures in measured.values()):
        table.caption += f"\n*: above the budget of {format_budget(data['budget'])}."
    return table
