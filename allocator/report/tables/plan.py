"""Tables of a plan, and of the targets that plans are handed to."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rich.markup import escape
from rich.table import Table

from allocator.core.costs import format_cost
from allocator.core.plan import Plan
from allocator.report.tables.base import make_table
from allocator.report.tables.formats import format_count, format_share


def plan_table(plan: Plan) -> Table:
    """Return one line per unit of a plan: what it keeps and what it loses."""
    table = make_table(f"{plan.model['id']}, {plan.space.pattern}: the plan")
    table.add_column("unit", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for heading in ("kept", "total", "removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        removed = format_share(unit.sparsity(level), 1)
        table.add_row(escape(unit.name), unit.kind, format_count(unit.kept[level]), format_count(unit.total), removed)
    table.add_section()
    space = plan.space
    achieved, dense = space.cost(plan.allocation), space.cost(space.dense)
    removed = format_share(space.sparsity(plan.allocation))
    table.add_row("whole model", "parameters", format_count(achieved), format_count(dense), removed, style="bold")
    kept = "; ".join(
        f"{cost} {format_cost(cost, space.cost(plan.allocation, cost))} of at most {format_cost(cost, limit)}"
        for cost, limit in plan.budget.limits.items()
    )
    table.caption = f"Budget: {kept}. Removed, last line: share of the units."
    return table


def targets_table(targets: Iterable[tuple[str, str, Collection[str]]]) -> Table:
    """Return one line per target of exports: its name, what it writes, and the patterns that it can express."""
    table = make_table("targets that plans can be handed to")
    table.add_column("target", no_wrap=True)
    table.add_column("what is written")
    table.add_column("patterns")
    for name, writes, patterns in targets:
        table.add_row(name, writes, ", ".join(patterns))
    return table
