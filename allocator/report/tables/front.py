"""A Pareto front as a table, as comma-separated values, and its hypervolume as a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from allocator.core.outcomes import LOSSES
from allocator.report.tables.base import make_table
from allocator.report.tables.formats import (
    format_count,
    format_figure,
    format_number,
    format_plural,
    format_point,
    format_share,
)

_MOST_POINTS = 24


def front_table(front: Mapping[str, Any]) -> Table:
    """Return the front, from large to small; a long one is thinned to evenly spaced points."""
    headings, rows = list_front_rows(front)
    indices = list(range(len(rows)))
    if len(rows) > _MOST_POINTS:
        last = len(rows) - 1
        indices = [round(step * last / (_MOST_POINTS - 1)) for step in range(_MOST_POINTS)]
    table = make_table(f"Pareto front: {format_plural(len(rows), 'point')}")
    for heading in ("", *headings):
        table.add_column(heading, justify="right")
    for index in indices:
        table.add_row(str(index), *rows[index])
    table.caption = f"{_name_loss(front)}: {format_count(front['tokens'])} search tokens"
    if len(indices) < len(rows):
        table.caption += f"\n{len(indices)} shown; front.json has all"
    return table


def list_front_rows(front: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """List the headings, and the figures of each member of the front."""
    points: Sequence[Mapping[str, Any]] = front["points"]
    names = list(dict.fromkeys([*(name for name in front["objectives"] if name != front["loss"]), "params"]))
    selected = ["selection"] if any("selection" in point for point in points) else []
    headings = [
        *("parameters" if name == "params" else name for name in names),
        "removed",
        _name_loss(front),
        *selected,
    ]
    rows = [
        [
            *(format_figure(name, point[name]) for name in names),
            format_share(point["sparsity"]),
            *(format_number(point.get(name), 4) for name in (front["loss"], *selected)),
        ]
        for point in points
    ]
    return headings, rows


def format_hypervolume(hypervolume: Mapping[str, Any]) -> str:
    """Format the ``hypervolume`` of ``front.json`` in one line."""
    evaluations = format_plural(hypervolume["curve"][-1][0], "evaluation")
    reference = format_point(hypervolume["reference"])
    return f"hypervolume {format_number(hypervolume['value'], 4)} after {evaluations}; reference point: {reference}"


def _name_loss(front: Mapping[str, Any]) -> str:
    return LOSSES[front["loss"]].split(",")[0]


def format_front_csv(front: Mapping[str, Any]) -> str:
    """Format the front as comma-separated values: the number and all figures of each member."""
    points: Sequence[Mapping[str, Any]] = front["points"]
    names = list(dict.fromkeys(name for point in points for name in point if name != "allocation"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *names])
    writer.writerows([index, *(point.get(name, "") for name in names)] for index, point in enumerate(points))
    return text.getvalue()
