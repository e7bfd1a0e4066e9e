"""Tables of a finished search: what was measured, and what the latency table predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from allocator.core.costs import COSTS
from allocator.report.tables.base import make_table
from allocator.report.tables.formats import format_change, format_count, format_number, format_share

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
"""Labels of measured models, in the order in which they are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured model.

    Attributes:
        key: Its name in ``result.json``.
        label: Its name in tables.
        params: Parameters of the whole model.
        sparsity: Removed share of the parameters inside units.
        perplexity: Perplexity on held-out text.
        kl: KL from the dense model on held-out text, nats per token; the relative distance of a model without logits.
        versus_uniform: ``kl`` relative to that of uniform, minus 1; below 0 is better.
        accuracy: Accuracy on labelled examples.
    """

    key: str
    label: str
    params: int | None
    sparsity: float | None
    perplexity: float | None
    kl: float | None
    versus_uniform: float | None
    accuracy: float | None = None


def find_distance(figures: Mapping[str, Any]) -> float | None:
    """Return the distance of a measured model from the dense one: its KL, or the distance of states without a KL."""
    distance: float | None = figures.get("kl", figures.get("hidden"))
    return distance


def list_headings(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the headings of the measurements: the scores on text or labels, and the distance."""
    measurements = {name for figures in measured.values() for name in figures}
    scores = [name for name in ("perplexity", "accuracy") if name in measurements]
    return [*scores, "distance" if "hidden" in measurements and "kl" not in measurements else "KL"]


def list_results(result: Mapping[str, Any]) -> list[Row]:
    """List the measured models of ``result.json``.

    A model that was made in another way than the rest is compared with the uniform model made in that way.
    """
    measured: Mapping[str, Mapping[str, Any]] = result["measured"]
    order = [*(key for key in LABELS if key in measured), *(key for key in measured if key not in LABELS)]
    rows = []
    for key in order:
        figures = measured[key]
        reference = key.replace("searched", "uniform") if key.startswith("searched_") else "uniform"
        base, kl = find_distance(measured.get(reference, {})), find_distance(figures)
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


def _format_scores(columns: Sequence[str], perplexity: float | None, accuracy: float | None) -> list[str]:
    """Format the scores on text or labels, for the columns that exist."""
    cells = {"perplexity": format_number(perplexity, 2), "accuracy": format_share(accuracy)}
    return [cells[name] for name in columns if name in cells]


def _format_caption(columns: Sequence[str]) -> str:
    if "distance" in columns:
        return "Held-out examples. Distance: relative, of hidden states from dense. Removed: share of the units."
    examples, sample = ("text", "token") if "perplexity" in columns else ("examples", "answer")
    return f"Held-out {examples}. KL: from dense, nats per {sample}. Removed: share of the units."


def result_table(result: Mapping[str, Any]) -> Table:
    """Return the measurements on held-out text: dense, the baselines and the searched plan."""
    table = make_table(f"{result['model']['id']}, {result['pattern']}, {result['asked']}")
    table.add_column("")
    columns = list_headings(result["measured"])
    for heading in ("parameters", "removed", *columns, "vs uniform"):
        table.add_column(heading, justify="right")
    rows = list_results(result)
    for row in rows:
        table.add_row(
            escape(row.label),
            format_count(row.params),
            format_share(row.sparsity),
            *_format_scores(columns, row.perplexity, row.accuracy),
            format_number(row.kl, 4),
            format_change(row.versus_uniform),
            style="bold" if row.key == "searched" else None,
        )
    table.caption = _format_caption(columns)
    if any(row.key.endswith("_assembled") for row in rows):
        table.caption += "\nAssembled: put together from the levels of the search, not pruned along its path."
    if any(row.key.endswith("_recomputed") for row in rows):
        table.caption += "\nRecomputed: pruned along its path, not put together from the levels of the search."
    if lines := result.get("search", {}).get("training"):
        table.caption += (
            f"\nTrained: put together, then trained on {format_count(lines[-1]['training'])} tokens, as in the search."
            f"\nRank correlation of losses before and after training: "
            + ", ".join(
                f"{format_number(line['rank_correlation'], 2)} after {format_count(line['training'])}"
                for line in lines
                if line["split"] == "search"
            )
            + "."
        )
    return table


def list_predictions(result: Mapping[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """List the predictions of the latency table next to the measurements, where there are both.

    Returns:
        For each: the model, the figure, the predicted and the measured milliseconds, and the relative error.
    """
    return [
        (LABELS[key], COSTS[name].label, each["predicted"], each["measured"], each["predicted"] / each["measured"] - 1)
        for key, figures in result.get("latency", {}).items()
        for name, each in figures.items()
    ]


def prediction_table(result: Mapping[str, Any]) -> Table:
    """Return the rows of :func:`list_predictions`."""
    table = make_table("Latency: predicted by the table, and measured end to end")
    table.add_column("")
    table.add_column("")
    for heading in ("predicted", "measured", "error"):
        table.add_column(heading, justify="right")
    for label, name, predicted, measured, error in list_predictions(result):
        table.add_row(
            escape(label), name, format_number(predicted, 3), format_number(measured, 3), format_change(error)
        )
    return table


def format_figures(figures: Mapping[str, float]) -> str:
    """Format the measurements of one checkpoint in one line."""
    measured = [f"{name} {figures[name]:.3f}" for name in ("perplexity", "accuracy") if name in figures]
    if "hidden" in figures:
        distance = f"relative distance of states from dense {figures['hidden']:.4f}"
    else:
        distance = f"KL from dense {figures['kl']:.4f} nats"
    per_token = " per token" if "perplexity" in figures else ""
    return ", ".join([f"{figures['params']:,} parameters", *measured, distance + per_token])
