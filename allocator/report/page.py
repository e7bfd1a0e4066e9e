"""The report of a run: one self-contained page, and its figures as files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.core.costs import COSTS
from allocator.core.files import read_json, write_atomic
from allocator.core.journal import Journal
from allocator.core.outcomes import LOSSES, build_front, read_front
from allocator.core.results import read_result
from allocator.core.space import Allocation, SearchSpace
from allocator.core.spending import sum_spending, trace_convergence
from allocator.core.training_effect import summarise_training
from allocator.report import figures
from allocator.report.marks import collect_candidates, collect_marks, collect_starts, restore_allocations
from allocator.report.tables.formats import (
    format_change,
    format_count,
    format_figure,
    format_number,
    format_point,
    format_share,
)
from allocator.report.tables.front import list_front_rows
from allocator.report.tables.result import find_distance, list_headings, list_predictions, list_results

if TYPE_CHECKING:
    from jinja2 import Template

_FILES = {
    "plan.json": "the plan: what each unit keeps, with its provenance",
    "checkpoint": "the pruned model; loads without this package",
    "front.json": "the Pareto front",
    "run.yaml": "the configuration, every default written out",
    "journal.jsonl": "every measurement, in order",
    "levels": "the level store: every unit pruned at every level",
    "figures": "the figures of this page as SVG",
}
_COLOURS = {
    figures.PAPER: "var(--paper)",
    figures.INK: "var(--ink)",
    figures.MUTED: "var(--muted)",
    figures.RULE: "var(--rule)",
    figures.SEARCHED: "var(--searched)",
    figures.TWO_RATE: "var(--two-rate)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _UnitRow:
    name: str
    kind: str
    total: int
    kept: int
    sparsity: float
    uniform: float


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.svg`` into the folder of a run, finished or not.

    Args:
        folder: The folder of the run, with a journal, and with ``result.json`` if the run is finished.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder holds no journal, or a file in it is damaged. Nothing was written.
    """
    from markupsafe import Markup

    journal = Journal.read(folder / "journal.jsonl")
    result = read_result(folder / "result.json")
    space = journal.space
    named = restore_allocations(space, result["units"]) if result else {}
    front = _load_front(folder / "front.json", journal)
    drawn = _draw_figures(journal, front, named, result)
    page = _load_template().render(
        run=folder.resolve().name,
        resume=f"allocator search --resume --name {shlex.quote(folder.resolve().name)}",
        header=journal.header.to_json(),
        result=result,
        dense_params=space.cost(space.dense),
        shown=list_headings(result["measured"]) if result else [],
        rows={row.key: row for row in list_results(result)} if result else {},
        predictions=list_predictions(result) if result else [],
        gains=_compare_with_baselines(result["measured"]) if result else {},
        units=_list_units(space, named),
        curve=trace_convergence(journal),
        loss=LOSSES[journal.loss].split(",")[0],
        front=front,
        members=_list_members(front, named) if journal.header.objectives else None,
        spending=sum_spending(journal),
        training=summarise_training(journal),
        point=format_point,
        figures={name: Markup(_inline_svg(svg)) for name, svg in drawn.items()},
        prints=_list_fingerprints(journal.header.to_json()),
        pruner=_read_pruner(folder),
        shared_text=any(seen["shared"] for texts in journal.header.text.values() for seen in texts.values()),
        files={
            name: what for name, what in _FILES.items() if (name == "figures" and drawn) or (folder / name).exists()
        },
    )
    for name, svg in drawn.items():
        (folder / "figures").mkdir(exist_ok=True)
        write_atomic(folder / "figures" / f"{name}.svg", svg)
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


@cache
def _load_template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=format_count, number=format_number, share=format_share, change=format_change)
    environment.filters.update(figure=format_figure, label=lambda name: COSTS[name].label)
    source = (resources.files("allocator.report") / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _compare_with_baselines(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the distance of the searched plan from dense, relative to each baseline, minus 1; below 0 is better."""
    baselines = {name: find_distance(measured[name]) for name in ("uniform", "two_rate") if name in measured}
    searched = find_distance(measured.get("searched", {}))
    return {} if searched is None else {name: searched / base - 1.0 for name, base in baselines.items() if base}


def _load_front(path: Path, journal: Journal) -> dict[str, Any]:
    """Return the front on disk, whose numbering of members commands use; else build it from the journal."""
    return read_front(path) if path.exists() else build_front(journal)


def _draw_figures(
    journal: Journal, front: Mapping[str, Any], named: Mapping[str, Allocation], result: Mapping[str, Any] | None
) -> dict[str, str]:
    """Draw the figures that the run has data for, as SVG by name."""
    curve, marks, space = trace_convergence(journal), collect_marks(journal, named), journal.space
    limits = journal.header.budget.limits.items() if journal.header.budget else ()
    budget = {cost: limit for cost, limit in limits if limit < space.cost(space.dense, cost)}
    drawn = {}
    if front["points"]:
        drawn["front"] = figures.front_figure(
            front, marks, collect_candidates(journal), collect_starts(journal), budget
        )
    if "hypervolume" in front:
        drawn["hypervolume"] = figures.hypervolume_figure(front["hypervolume"]["curve"])
    elif curve:
        drawn["convergence"] = figures.convergence_figure(curve, marks, journal.loss)
    if result and {"uniform", "searched"} <= set(named):
        drawn["sparsity"] = figures.sparsity_figure(result["units"])
    return {name: figures.to_svg(figure, name) for name, figure in drawn.items()}


def _inline_svg(svg: str) -> str:
    """Fit an SVG into the page: without prologue and namespaces, and with the page's colours, light or dark."""
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r'(<svg) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="max-width: \2pt"', svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def _list_members(front: Mapping[str, Any], named: Mapping[str, Allocation]) -> dict[str, Any]:
    """List the front as ``headings`` and ``rows``; ``chosen`` has the numbers of the members that are the plan."""
    headings, rows = list_front_rows(front)
    plan = list(named.get("searched", ()))
    chosen = [number for number, point in enumerate(front["points"]) if point["allocation"] == plan]
    return {"headings": headings, "rows": rows, "chosen": chosen}


def _list_units(space: SearchSpace, named: Mapping[str, Allocation]) -> list[_UnitRow]:
    if not {"uniform", "searched"} <= set(named):
        return []
    return [
        _UnitRow(
            name=unit.name,
            kind=unit.kind,
            total=unit.total,
            kept=unit.kept[level],
            sparsity=unit.sparsity(level),
            uniform=unit.sparsity(even),
        )
        for unit, level, even in zip(space.units, named["searched"], named["uniform"], strict=True)
    ]


def _list_fingerprints(header: Mapping[str, Any]) -> dict[str, str]:
    """List the hashes of what the run depended on."""
    identity = header.get("identity", {})
    prints = {"model": header["model"]["fingerprint"], "search space": identity.get("space")}
    prints |= {f"{split} text": value for split, value in identity.get("text", {}).items()}
    return {name: value for name, value in prints.items() if value}


def _read_pruner(folder: Path) -> dict[str, Any]:
    """Read the local pruner and its settings from the plan."""
    if not (folder / "plan.json").exists():
        return {}
    return {name.replace("_", " "): value for name, value in read_json(folder / "plan.json", "plan")["pruner"].items()}
