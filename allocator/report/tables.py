"""Tables for a terminal of 80 to 100 columns, and the rows and number formats that the page shares with them."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from allocator.core.costs import COSTS, format_cost
from allocator.core.latency import LatencyTable, Timing
from allocator.core.outcomes import LOSSES
from allocator.core.plan import Plan
from allocator.core.space import Cost, SearchSpace, Unit

LABELS = {
    "dense": "dense",
    "uniform": "uniform",
    "two_rate": "two-rate uniform",
    "searched": "searched",
    "uniform_assembled": "uniform, assembled",
    "searched_assembled": "searched, assembled",
    "uniform_recomputed": "uniform, recomputed",
    "searched_recomputed": "searched, recomputed",
    "uniform_trained": "uniform, trained",
    "searched_trained": "searched, trained",
}
"""How measured models are called, in the order in which they are shown."""

_NONE = "—"
_MINUS = "\N{MINUS SIGN}"
_MOST_POINTS = 24


@dataclass(frozen=True, slots=True)
class Row:
    """One measured model, ready to be shown.

    Attributes:
        key: Its name in ``result.json``.
        label: Its name for people.
        params: Parameters of the whole model.
        sparsity: Share of the parameters inside units removed.
        perplexity: On held-out text.
        kl: From the dense model on held-out text, nats per token; of a model without logits the relative distance.
        versus_uniform: That relative to uniform; below 0 is better.
        accuracy: On labelled examples.
    """

    key: str
    label: str
    params: int | None
    sparsity: float | None
    perplexity: float | None
    kl: float | None
    versus_uniform: float | None
    accuracy: float | None = None


def distance(figures: Mapping[str, Any]) -> float | None:
    """Return how far a measured model is from the dense one: its KL, or the distance of states where it has no KL."""
    found: float | None = figures.get("kl", figures.get("hidden"))
    return found


def headings(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what there is of measured models beside parameters: what text or labels say of them, and the distance."""
    every = {name for figures in measured.values() for name in figures}
    said = [name for name in ("perplexity", "accuracy") if name in every]
    return [*said, "distance" if "hidden" in every and "kl" not in every else "KL"]


def result_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the measured models of ``result.json``, those that are there.

    What was made another way than the rest is compared with uniform made that way.
    """
    measured: Mapping[str, Mapping[str, Any]] = result["measured"]
    order = [*(key for key in LABELS if key in measured), *(key for key in measured if key not in LABELS)]
    rows = []
    for key in order:
        figures = measured[key]
        reference = key.replace("searched", "uniform") if key.startswith("searched_") else "uniform"
        base, kl = distance(measured.get(reference, {})), distance(figures)
        versus = kl / base - 1.0 if key.split("_")[0] in ("two", "searched") and kl is not None and base else None
        rows.append(
            Row(
                key=key,
                label=LABELS.get(key, key.replace("_", " ")),
                params=figures.get("params"),
                sparsity=figures.get("sparsity"),
                perplexity=figures.get("perplexity"),
                kl=kl,
                versus_uniform=versus,
                accuracy=figures.get("accuracy"),
            )
        )
    return rows


def _said(columns: Sequence[str], perplexity: float | None, accuracy: float | None) -> list[str]:
    """Return what text or labels say, for those of the columns that are there."""
    cells = {"perplexity": number(perplexity, 2), "accuracy": share(accuracy)}
    return [cells[name] for name in columns if name in cells]


def _caption(columns: Sequence[str]) -> str:
    if "distance" in columns:
        return "Held-out examples. Distance: of states from dense, relative. Removed: share of the units."
    what, each = ("text", "token") if "perplexity" in columns else ("examples", "answer")
    return f"Held-out {what}. KL: from dense, nats per {each}. Removed: share of the units."


def result_table(result: Mapping[str, Any]) -> Table:
    """Return what was measured on held-out text: dense, the baselines and the searched plan."""
    table = _table(f"{result['model']['id']}, {result['pattern']}, {result['asked']}")
    table.add_column("")
    columns = headings(result["measured"])
    for heading in ("parameters", "removed", *columns, "vs uniform"):
        table.add_column(heading, justify="right")
    rows = result_rows(result)
    for row in rows:
        table.add_row(
            escape(row.label),
            count(row.params),
            share(row.sparsity),
            *_said(columns, row.perplexity, row.accuracy),
            number(row.kl, 4),
            change(row.versus_uniform),
            style="bold" if row.key == "searched" else None,
        )
    table.caption = _caption(columns)
    if any(row.key.endswith("_assembled") for row in rows):
        table.caption += "\nAssembled: put together from what the search saw, not pruned along its path."
    if any(row.key.endswith("_recomputed") for row in rows):
        table.caption += "\nRecomputed: pruned along its path, not put together from what the search saw."
    if lines := result.get("search", {}).get("training"):
        table.caption += (
            f"\nTrained: put together, then trained on {count(lines[-1]['training'])} tokens, as the search chose."
            f"\nRank correlation of losses before and after training: "
            + ", ".join(
                f"{number(line['rank_correlation'], 2)} after {count(line['training'])}"
                for line in lines
                if line["split"] == "search"
            )
            + "."
        )
    return table


def prediction_rows(result: Mapping[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """Return predictions of the latency table beside what was measured, where it was.

    Returns:
        A model, a figure, the milliseconds that were predicted and those that were measured, and the relative error.
    """
    return [
        (LABELS[key], COSTS[name].label, each["predicted"], each["measured"], each["predicted"] / each["measured"] - 1)
        for key, figures in result.get("latency", {}).items()
        for name, each in figures.items()
    ]


def prediction_table(result: Mapping[str, Any]) -> Table:
    """Return the rows of :func:`prediction_rows`."""
    table = _table("What the latency table predicts, and whole models end to end")
    table.add_column("")
    table.add_column("")
    for heading in ("predicted", "measured", "error"):
        table.add_column(heading, justify="right")
    for label, name, predicted, measured, error in prediction_rows(result):
        table.add_row(escape(label), name, number(predicted, 3), number(measured, 3), change(error))
    return table


def front_table(front: Mapping[str, Any]) -> Table:
    """Return the front, from large to small; of a long one, points evenly spaced along it."""
    headings, rows = front_rows(front)
    places = list(range(len(rows)))
    if len(rows) > _MOST_POINTS:
        last = len(rows) - 1
        places = [round(step * last / (_MOST_POINTS - 1)) for step in range(_MOST_POINTS)]
    table = _table(f"Pareto front: {_plural(len(rows), 'point')}")
    for heading in ("", *headings):
        table.add_column(heading, justify="right")
    for place in places:
        table.add_row(str(place), *rows[place])
    table.caption = f"{_loss(front)}: {count(front['tokens'])} search tokens"
    if len(places) < len(rows):
        table.caption += f"\n{len(places)} shown; front.json has all"
    return table


def front_rows(front: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings, and of each member of the front its figures."""
    points: Sequence[Mapping[str, Any]] = front["points"]
    names = list(dict.fromkeys([*(name for name in front["objectives"] if name != front["loss"]), "params"]))
    selected = ["selection"] if any("selection" in point for point in points) else []
    headings = [*("parameters" if name == "params" else name for name in names), "removed", _loss(front), *selected]
    rows = [
        [
            *(figure(name, point[name]) for name in names),
            share(point["sparsity"]),
            *(number(point.get(name), 4) for name in (front["loss"], *selected)),
        ]
        for point in points
    ]
    return headings, rows


def hypervolume(kept: Mapping[str, Any]) -> str:
    """Return the ``hypervolume`` of ``front.json`` in one line."""
    after = _plural(kept["curve"][-1][0], "evaluation")
    return f"hypervolume {number(kept['value'], 4)} after {after}; reference point: {point(kept['reference'])}"


def _loss(front: Mapping[str, Any]) -> str:
    return LOSSES[front["loss"]].split(",")[0]


def front_csv(front: Mapping[str, Any]) -> str:
    """Return the front as comma-separated values: the number of each member, and every figure of it."""
    points: Sequence[Mapping[str, Any]] = front["points"]
    names = list(dict.fromkeys(name for point in points for name in point if name != "allocation"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *names])
    writer.writerows([place, *(point.get(name, "") for name in names)] for place, point in enumerate(points))
    return text.getvalue()


def status_lines(status: Mapping[str, Any]) -> str:
    """Return how a run is, as :func:`allocator.run.status.read_status` tells it, a line for each thing."""
    state, age = status["state"], _duration(status["age_s"])
    states = {
        "running": f"running, heard of {age} ago",
        "lost": f"not running: nothing writes this run, last heard of {age} ago",
    }
    total, left = status["total"], status.get("phase_left_s")
    phase = f"{status['phase']}, {status['done']} of {total}" if total else status["phase"]
    of_round = " in this round" if "/" in status["phase"] else ""  # as in "search 2/2"
    measured = f"{_plural(status.get('evaluations', 0), 'allocation')}{of_round}"
    pace = status.get("evaluations_per_s")
    lines = {
        "state": states.get(state, f"{state} {age} ago"),
        "error": status.get("error", ""),
        "phase": ""
        if state == "finished"
        else phase
        if left is None or state != "running"
        else f"{phase}, about {_duration(left)} left",
        "measured": measured if pace is None or state != "running" else f"{measured}, {pace:.3g} per second",
        **{name: f"{value:.4f}" for name, value in status.get("reached", {}).items()},
        "front": _plural(status["front"], "member") if "front" in status else "",
        "workers": f"{status['workers']} alive" if status.get("workers") and state == "running" else "",
    }
    return "\n".join(f"{name:<11} {escape(text)}" for name, text in lines.items() if text)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def space_table(space: SearchSpace) -> Table:
    """Return a line per unit: what it is, what its levels keep, and its parameters when dense."""
    table = _table(f"{space.pattern} search space: {_plural(len(space.units), 'unit')}")
    table.add_column("unit", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("kept at each level", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for unit in space.units:
        table.add_row(escape(unit.name), unit.kind, count(unit.total), ladder(unit), count(unit.params[0]))
    table.add_section()
    table.add_row("embeddings, norms, head", "fixed", "", "", count(space.fixed["params"]))
    table.add_row("whole model", "", "", "", count(space.cost(space.dense)), style="bold")
    return table


def undivided(space: SearchSpace) -> str | None:
    """Return which units lose all or nothing, in a line; None where every unit can lose a part."""
    parts = sorted({unit.part for unit in space.units if unit.kind != "matrix" and unit.total == 1})
    if not parts:
        return None
    return f"{' and '.join(parts)} goes as a whole or not at all: no part of it can go without the rest"


def targets_table(targets: Iterable[tuple[str, str, Collection[str]]]) -> Table:
    """Return a line per target of exports: its name, what is written, and the patterns it can express."""
    table = _table("what plans can be handed to")
    table.add_column("target", no_wrap=True)
    table.add_column("what is written")
    table.add_column("patterns")
    for name, writes, patterns in targets:
        table.add_row(name, writes, ", ".join(patterns))
    return table


def coverage_table(rows: Iterable[tuple[str, Sequence[int], int, str | None]]) -> Table:
    """Return a line per matrix of a model: its name, shape, in how many blocks it is, and what covers it."""
    table = _table("matrices of the model")
    table.add_column("module", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    table.add_column("covered by", no_wrap=True)
    for module, shape, times, by in rows:
        style = "bold red" if by is None else None
        table.add_row(escape(module), " x ".join(map(count, shape)), count(times), by or "nothing", style=style)
    return table


def alignment(lack: Mapping[str, Any]) -> str:
    """Return what aligned ladders lack beside those of any width, in two lines."""
    parts = "; ".join(
        f"{part} has {own['levels']} levels of {own['unaligned']}, "
        f"at most {share(own['furthest'])} of its channels away"
        for part, own in lack["parts"].items()
    )
    unused = "; ".join(
        f"{cost} {figure(cost, left['aligned'])} "
        f"({'out of reach' if left['unaligned'] is None else figure(cost, left['unaligned'])} with align 1)"
        for cost, left in lack["unused"].items()
    )
    return f"align {lack['multiple']}: {parts} from those of align 1\nuniform leaves unused: {unused}"


def plan_table(plan: Plan) -> Table:
    """Return a line per unit of a plan: what it keeps and what it loses."""
    table = _table(f"{plan.model['id']}, {plan.space.pattern}: the plan")
    table.add_column("unit", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for heading in ("kept", "total", "removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        removed = share(unit.sparsity(level), 1)
        table.add_row(escape(unit.name), unit.kind, count(unit.kept[level]), count(unit.total), removed)
    table.add_section()
    space = plan.space
    achieved, dense = space.cost(plan.allocation), space.cost(space.dense)
    removed = share(space.sparsity(plan.allocation))
    table.add_row("whole model", "parameters", count(achieved), count(dense), removed, style="bold")
    kept = "; ".join(
        f"{cost} {format_cost(cost, space.cost(plan.allocation, cost))} of at most {format_cost(cost, limit)}"
        for cost, limit in plan.budget.limits.items()
    )
    table.caption = f"Budget: {kept}. Removed, last line: share of the units."
    return table


def latency_table(table: LatencyTable) -> Table:
    """Return what a sub-block of each shape takes, by the items that it keeps."""
    made = _table(f"{', '.join(table.device.values())}: milliseconds, batch {table.settings.batch}")
    made.add_column("sub-block")
    for heading in ("kept", f"prefill of {table.settings.prompt}", "decoded token", "spread"):
        made.add_column(heading, justify="right", no_wrap=True)

    def row(name: str, kept: str, timing: Timing) -> None:
        times = (format_cost("latency_ms", timing.prefill_ns), format_cost("latency_ms", timing.decode_ns))
        made.add_row(name, kept, *times, share(timing.spread, 0))

    row("what no sub-block takes", "", table.fixed)
    for shape, timings in table.units.items():
        for index, timing in enumerate(timings):
            row("" if index else escape(shape), count(timing.kept), timing)
    return made


def bounds(limits: Mapping[Cost, float]) -> str:
    """Return a budget, as it is written, in words."""
    return " and ".join(f"{cost} <= {figure(cost, limit)}" for cost, limit in limits.items())


def comparison_table(data: Mapping[str, Any]) -> Table:
    """Return what a comparison measured: dense, then rules and plans from the nearest to dense to the furthest."""
    measured: Mapping[str, Mapping[str, Any]] = data["measured"]
    base, columns = distance(measured["uniform"]), headings(measured)
    table = _table(f"{data['model']['id']}, {data['pattern']}, {data['asked']}")
    table.add_column("")
    for heading in ("parameters", "removed", *columns, "vs uniform"):
        table.add_column(heading, justify="right")
    for name in sorted(measured, key=lambda name: (name != "dense", distance(measured[name]), name)):
        figures = measured[name]
        away = distance(figures)
        versus = away / base - 1.0 if base and away is not None and name not in ("dense", "uniform") else None
        table.add_row(
            escape(name) + ("" if figures["within_budget"] else " *"),
            count(figures["params"]),
            share(figures["sparsity"]),
            *_said(columns, figures.get("perplexity"), figures.get("accuracy")),
            number(away, 4),
            change(versus),
            style="bold" if name.startswith("plan ") else None,
        )
    table.caption = _caption(columns)
    if not all(figures["within_budget"] for figures in measured.values()):
        table.caption += f"\n*: above the budget of {bounds(data['budget'])}."
    return table


def ladder(unit: Unit) -> str:
    """Return the counts that a unit's levels keep, in short where the ladder is long."""
    kept = unit.kept
    steps = {a - b for a, b in pairwise(kept)}
    if len(kept) <= 5:
        return " ".join(map(str, kept))
    if len(steps) == 1:
        return f"{kept[0]} .. {kept[-1]} by {steps.pop()}"
    if unit.kind == "matrix":
        return f"{share(kept[1] / kept[0], 0)} .. {share(kept[-1] / kept[0], 0)}, {len(kept)} levels"
    return f"{kept[0]} {kept[1]} .. {kept[-1]}, {len(kept)} levels"


def figure(name: str, value: float) -> str:
    """Format a cost as it is written, or what was measured."""
    if name not in COSTS:
        return number(value, 4)
    return count(int(value)) if COSTS[name].scale == 1 else number(value, 3)


def point(figures: Mapping[str, float]) -> str:
    """Format several figures with their names."""
    return ", ".join(f"{name} {figure(name, value)}" for name, value in figures.items())


def count(value: int | None) -> str:
    """Format an integer with thousands separators."""
    return _NONE if value is None else f"{value:,}"


def number(value: float | None, digits: int) -> str:
    """Format a figure; a large one loses its decimals, for nobody reads them."""
    if value is None:
        return _NONE
    return f"{value:,.{digits}f}" if abs(value) < 10_000 else f"{value:,.0f}"


def share(value: float | None, digits: int = 2) -> str:
    """Format a share in [0, 1] as a percentage."""
    return _NONE if value is None else f"{value:.{digits}%}"


def change(value: float | None) -> str:
    """Format a relative difference as a signed percentage."""
    if value is None:
        return _NONE
    text = f"{abs(value):.1%}"
    sign = "" if text == "0.0%" else "+" if value > 0 else _MINUS
    return sign + text


def _table(title: str) -> Table:
    return Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def _plural(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def figures_line(figures: Mapping[str, float]) -> str:
    """Return what was measured of one checkpoint, on one line."""
    measured = [f"{name} {figures[name]:.3f}" for name in ("perplexity", "accuracy") if name in figures]
    if "hidden" in figures:
        distance = f"relative distance of states from dense {figures['hidden']:.4f}"
    else:
        distance = f"KL from dense {figures['kl']:.4f} nats"
    per_token = " per token" if "perplexity" in figures else ""
    return ", ".join([f"{figures['params']:,} parameters", *measured, distance + per_token])
