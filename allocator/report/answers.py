"""What each command prints for people: tables and lines, from the verb's plain results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from allocator.core.latency import LatencyTable
from allocator.core.plan import Plan
from allocator.core.space import SearchSpace
from allocator.report.tables.compare import comparison_table
from allocator.report.tables.formats import format_budget
from allocator.report.tables.front import format_hypervolume, front_table
from allocator.report.tables.model import format_alignment, format_undivided, latency_table, space_table
from allocator.report.tables.plan import plan_table
from allocator.report.tables.result import prediction_table, result_table
from allocator.report.tables.status import format_status

Answer = list[Table | str]


def answer_inspection(space: SearchSpace, summary: Mapping[str, Any]) -> Answer:
    """Show a search space, its budget and the uniform baseline."""
    answer: Answer = [space_table(space)]
    if (line := format_undivided(space)) is not None:
        answer.append(line)
    params = summary["uniform"]["params"]
    answer.append(f"{summary['asked']}: {format_budget(summary['budget'])}; uniform has {params:,} parameters")
    answer += [format_alignment(summary["align"])] if "align" in summary else []
    return [*answer, *summary.get("text", [])]


def answer_latency(table: LatencyTable, out: Path) -> Answer:
    """Show a latency table."""
    command = f"allocator search --constraint 'latency_ms <= 0.5x' --set workload.latency={out}"
    return [latency_table(table), f"table  {out}\nnext   {command}"]


def answer_search(summary: Mapping[str, Any], folder: Path) -> Answer:
    """Show the figures of a finished search, and where everything is."""
    spent = summary["search"]
    return [
        result_table(summary),
        *([prediction_table(summary)] if "latency" in summary else []),
        f"search      {spent['evaluations']:,} allocations measured; {spent['ended']}\n"
        f"plan        {folder / 'plan.json'}\n"
        f"checkpoint  {folder / 'checkpoint'}\n"
        f"report      {folder / 'report.html'}\n"
        f"next        allocator front {folder}",
    ]


def answer_job(job: str, run: Path, address: str, size_bytes: int) -> Answer:
    """Show a submitted job, and how to watch and stop it."""
    return [
        f"job   {job}, {size_bytes / 2**20:.1f} MiB sent\nrun   {run}\n"
        f"next  allocator status {run}\n"
        f"      ray job logs --follow --address {address} {job}\n"
        f"      ray job stop --address {address} {job}"
    ]


def answer_comparison(data: Mapping[str, Any], folder: Path) -> Answer:
    """Show a comparison."""
    return [comparison_table(data), f"comparison  {folder / 'compare.json'}"]


def answer_status(status: Mapping[str, Any]) -> Answer:
    """Show the state of a run, and how to continue one that stopped."""
    stopped = status["state"] in ("stopped", "failed", "lost")
    again = ["next        resume it with --resume, or submit it again"] if stopped else []
    return [format_status(status), *again]


def answer_front(front: Mapping[str, Any], run: Path) -> Answer:
    """Show a front, and how to take a plan from it."""
    volume = [format_hypervolume(front["hypervolume"])] if "hypervolume" in front else []
    return [front_table(front), *volume, f"next  allocator plan {run} --index NUMBER --out plan.json"]


def answer_plan(plan: Plan, out: Path | None) -> Answer:
    """Show a plan, and how to execute one that was written."""
    written = [] if out is None else [f"plan  {out}\nnext  allocator prune {out} --out FOLDER"]
    return [plan_table(plan), *written]
