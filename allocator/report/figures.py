"""Figures as pure functions of data, and their deterministic SVG.

Colours are from Okabe and Ito (2008), and no two things differ by colour alone. pyplot is not used.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from allocator.core.costs import COSTS
from allocator.core.outcomes import LOSSES, Figures
from allocator.core.space import Cost
from allocator.report.tables.result import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, RULE = "#ffffff", "#24292f", "#6a737d", "#e1e4e8"
SEARCHED, TWO_RATE = "#0072b2", "#d55e00"
CELL_DARK, CELL_LIGHT = "#1b1b1b", "#fafafa"
"""Colours of text on the cells of a heat map, whose own colours are the same on a dark page."""

_MARKS = {"uniform": ("s", INK), "two_rate": ("D", TWO_RATE), "searched": ("o", SEARCHED)}
_LINES = {"uniform": (0, (4, 2)), "two_rate": (0, (1, 1.5))}
_WIDTH, _WIDE, _HEIGHT = 5.6, 10.0, 3.5
_SMALL = 8.5
_MOST_ANNOTATED = 16
_MOST_ABREAST = 5
_LOG_BEYOND = 20.0
_FLOOR = 1e-3
_FAR = 4.0


def front_figure(
    front: Mapping[str, Any],
    marks: Mapping[str, Figures] = MappingProxyType({}),
    cloud: Sequence[Figures] = (),
    starts: Sequence[Figures] = (),
    budget: Mapping[Cost, int] = MappingProxyType({}),
) -> Figure:
    """Draw the front, with one panel for each objective after the first.

    The steps of a panel are the lowest first objective under an upper bound on the panel's objective. With three or
    more objectives, the other members of the front are dots above the steps.

    Args:
        front: The content of ``front.json``.
        marks: Allocations to mark, measured on the same text: ``uniform``, ``two_rate``, ``searched``.
        cloud: The outcomes that the front was chosen from.
        starts: Further uniform allocations.
        budget: The limits on costs.
    """
    from matplotlib.figure import Figure

    first, *names = front["objectives"]
    marked = [*(("uniform", start) for start in starts), *marks.items()]
    figure = Figure(figsize=(_WIDTH if len(names) == 1 else _WIDE, _HEIGHT), layout="constrained")
    figure.set_facecolor(PAPER)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _style_axes(axes)
        _draw_front_panel(
            axes, name, front, marked, cloud, budget[name] / COSTS[name].scale if name in budget else None
        )
    panels[0].set_ylabel(f"{_label_axis(first)}\n({front['tokens']:,} tokens, search split)")
    _draw_legend(figure)
    return figure


def hypervolume_figure(curve: Sequence[tuple[int, int, float]]) -> Figure:
    """Draw the hypervolume of the front against the number of evaluations.

    Args:
        curve: Evaluations, candidate-tokens and hypervolume after each batch.
    """
    figure, axes = _make_figure()
    counts, values = [count for count, _, _ in curve], [value for _, _, value in curve]
    axes.step(counts, values, where="post", color=SEARCHED, lw=1.6)
    axes.plot(counts[-1], values[-1], "o", color=SEARCHED, ms=5, mec=PAPER, mew=0.8, zorder=3)
    axes.set_xlim(0, counts[-1] * 1.03)
    axes.set_ylim(0, max(*values, _FLOOR) * 1.08)
    axes.xaxis.set_major_formatter(_format_si)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("hypervolume of the front")
    return figure


def convergence_figure(curve: Sequence[tuple[float, float]], marks: Mapping[str, Figures], loss: str) -> Figure:
    """Draw the lowest loss so far against candidate-tokens, with the losses of the baselines on the same text.

    The frame fits the search: a baseline far above it is only named in the legend.

    Args:
        curve: From :func:`allocator.core.spending.trace_convergence`, at least one point.
        marks: As for :func:`front_figure`.
        loss: Key of :data:`allocator.core.outcomes.LOSSES`.
    """
    figure, axes = _make_figure()
    spent, best = [x for x, _ in curve], [y for _, y in curve]
    baselines = {name: mark[loss] for name, mark in marks.items() if name in _LINES}
    closest = min(baselines.values(), default=best[0])
    ceiling = best[-1] + _FAR * max(closest - best[-1], 0.05 * best[-1])
    _scale_loss(axes, [min(value, ceiling) for value in (*best, closest)])
    for name, value in baselines.items():
        label = LABELS[name] if value <= ceiling else f"{LABELS[name]}: {value:.3g}, above"
        axes.axhline(value, color=_MARKS[name][1], lw=1, ls=_LINES[name], label=label, zorder=1)
    axes.step(spent, best, where="post", color=SEARCHED, lw=1.6, label="best so far", zorder=2)
    axes.plot(spent[-1], best[-1], "o", color=SEARCHED, ms=5, mec=PAPER, mew=0.8, zorder=3)
    axes.set_xlim(0, spent[-1] * 1.03)
    axes.xaxis.set_major_formatter(_format_si)
    axes.set_xlabel("candidate-tokens spent")
    axes.set_ylabel(f"{LOSSES[loss]}\n(within the budget, search split)")
    _draw_legend(figure)
    return figure


def sparsity_figure(units: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the share that the plan and uniform remove from each block, one panel per part.

    A part with one unit per block gets bars, with uniform as a line. A part with several (matrices) gets a
    heat map of the difference from uniform, with the plan's own sparsity written in the cells.

    Args:
        units: The ``units`` of ``result.json``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    parts: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        parts.setdefault(unit["part"], []).append(unit)
    blocks = sorted({unit["block"] for unit in units})
    rows = {part: list(dict.fromkeys(_leaf_name(unit) for unit in own)) for part, own in parts.items()}
    heights = {part: 1.25 if len(rows[part]) == 1 else 0.32 * len(rows[part]) for part in parts}
    figure = Figure(figsize=(_WIDE, sum(heights.values()) + 0.5 * len(parts) + 0.9), layout="constrained")
    figure.set_facecolor(PAPER)
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))[:, 0]
    maps = []
    reach = max(0.1, *(abs(_difference_from_uniform(unit)) for unit in units))
    for axes, (part, own) in zip(panels, parts.items(), strict=True):
        if len(rows[part]) == 1:
            _style_axes(axes)
            _draw_bars(axes, own)
        else:
            _style_axes(axes, grid=False)
            maps.append((axes, _draw_heat_map(axes, own, blocks, rows[part], reach)))
        axes.set_title(part, fontsize=9.5, color=INK, loc="left", fontweight="bold")
    panels[-1].set_xlabel("block")
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
    panels[-1].set_xlim(blocks[0] - 0.6, blocks[-1] + 0.6)
    if maps:
        bar = figure.colorbar(maps[0][1], ax=[axes for axes, _ in maps], pad=0.015, aspect=28)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=_SMALL, colors=INK, length=0)
        bar.ax.yaxis.set_major_formatter(_format_points)
        bar.set_label("points against uniform", fontsize=_SMALL, color=INK)
    _draw_legend(figure)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """Convert a figure to SVG: with text as text, without a date, and with the same ids every time.

    Args:
        figure: The figure.
        name: Prefix of every id, so that several figures can share a page.
    """
    import matplotlib

    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", buffer.getvalue())
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def _make_figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    figure.set_facecolor(PAPER)
    axes = figure.subplots()
    _style_axes(axes)
    return figure, axes


def _style_axes(axes: Axes, grid: bool = True) -> None:
    """Remove every line that carries no data."""
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_visible(grid)
    axes.tick_params(which="both", labelsize=_SMALL, labelcolor=INK, color=MUTED, length=0)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    if grid:
        axes.grid(axis="y", color=RULE, lw=0.8)
        axes.set_axisbelow(True)


def _scale_loss(axes: Axes, values: Sequence[float]) -> None:
    """Frame the values; on a logarithmic axis where they span a large range."""
    low, high = max(min(values), _FLOOR), max(*values, _FLOOR)
    if high / low > _LOG_BEYOND:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.set_ylim(low / 1.4, high * 1.4)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 1000 else (1.0,)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    margin = 0.12 * (max(values) - min(values)) or 0.1 * high
    axes.set_ylim(max(0.0, min(values) - margin), max(values) + margin)


def _draw_front_panel(
    axes: Axes,
    name: str,
    front: Mapping[str, Any],
    marked: Sequence[tuple[str, Figures]],
    cloud: Sequence[Figures],
    limit: float | None,
) -> None:
    """Draw one panel: the first objective against another."""
    loss, members = front["objectives"][0], front["points"]
    shown = [*members, *(figures for _, figures in marked)]
    xs = [*(figures[name] for figures in shown), *([] if limit is None else [limit])]
    middle = (min(xs) + max(xs)) / 2
    reach = max(0.56 * (max(xs) - min(xs)), 0.01 * middle)

    def dots(points: Sequence[Figures], shape: str, **style: Any) -> None:
        axes.plot([point[name] for point in points], [point[loss] for point in points], shape, **style)

    dots(cloud, ".", color=MUTED, alpha=0.35, ms=4, mew=0, zorder=1)
    steps = sorted((point[name], point[loss]) for point in members)
    best = list(accumulate((value for _, value in steps), min))
    ends = [*(x for x, _ in steps), middle + reach]
    axes.step(ends, [*best, best[-1]], where="post", color=SEARCHED, lw=1.6, label="front")
    dots(members, "o", color=SEARCHED, ms=3, mew=0, zorder=3)
    again = [point for point in members if "selection" in point]
    dots(again, "o", mfc="none", mec=SEARCHED, mew=0.9, ms=6.5, label="measured again", zorder=3)
    if limit is not None:
        axes.axvline(limit, color=MUTED, lw=1, ls=(0, (4, 2)), label="budget", zorder=0)
    for kind, figures in marked:
        _draw_mark(axes, kind, figures[name], figures[loss])
    _scale_loss(axes, [figures[loss] for figures in shown])
    axes.set_xlim(middle - reach, middle + reach)
    axes.xaxis.set_major_formatter(_format_si)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(_label_axis(name))


def _draw_mark(axes: Axes, name: str, x: float, y: float) -> None:
    shape, color = _MARKS[name]
    size, order = (9, 4) if name == "searched" else (6, 5)
    axes.plot(x, y, shape, color=color, ms=size, mec=PAPER, mew=1.0, ls="", label=LABELS[name], zorder=order)


def _draw_legend(figure: Figure) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left",
            ncols=len(handles) if len(handles) <= _MOST_ABREAST or figure.get_figwidth() > _WIDTH else 3,
            frameon=False,
            fontsize=_SMALL,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
        )


def _draw_bars(axes: Axes, units: Sequence[Mapping[str, Any]]) -> None:
    blocks = [unit["block"] for unit in units]
    searched = [unit["sparsity"]["searched"] for unit in units]
    uniform = [unit["sparsity"]["uniform"] for unit in units]
    axes.bar(
        blocks, searched, width=0.72, color=SEARCHED, edgecolor=SEARCHED, lw=1.5, label=LABELS["searched"], zorder=2
    )
    lefts, rights = [block - 0.5 for block in blocks], [block + 0.5 for block in blocks]
    axes.hlines(uniform, lefts, rights, color=INK, lw=1.4, label=LABELS["uniform"], zorder=3)
    for (x, low), (_, high) in pairwise(zip(rights, uniform, strict=True)):
        axes.vlines(x, *sorted((low, high)), color=INK, lw=1.4, zorder=3)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50%", "", "100%"])
    axes.set_ylabel("removed")


def _draw_heat_map(
    axes: Axes, units: Sequence[Mapping[str, Any]], blocks: Sequence[int], rows: Sequence[str], reach: float
) -> Any:
    import matplotlib
    import numpy as np
    from matplotlib.colors import ListedColormap

    palette = ListedColormap(matplotlib.colormaps["PuOr_r"](np.linspace(0.12, 0.88, 21)))
    difference = np.full((len(rows), len(blocks)), np.nan)
    for unit in units:
        row, column = rows.index(_leaf_name(unit)), blocks.index(unit["block"])
        difference[row, column] = difference_here = _difference_from_uniform(unit)
        if len(blocks) <= _MOST_ANNOTATED:
            text = f"{100 * unit['sparsity']['searched']:.0f}"
            color = CELL_LIGHT if abs(difference_here) > 0.65 * reach else CELL_DARK
            axes.text(unit["block"], row, text, ha="center", va="center", fontsize=7.5, color=color)
    mesh = axes.pcolormesh(
        blocks, range(len(rows)), difference, cmap=palette, vmin=-reach, vmax=reach, edgecolors=PAPER, lw=1
    )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    return mesh


def _leaf_name(unit: Mapping[str, Any]) -> str:
    return str(unit["name"].rpartition(".")[2])


def _difference_from_uniform(unit: Mapping[str, Any]) -> float:
    return float(unit["sparsity"]["searched"] - unit["sparsity"]["uniform"])


def _label_axis(name: str) -> str:
    """Return the label of the axis for a measurement or a cost."""
    if name == "params":
        return "parameters of the whole model"
    if name in COSTS:
        return COSTS[name].label
    loss, _, domain = name.partition(".")
    return f"{LOSSES.get(loss, loss)}{f', on {domain}' if domain else ''}"


def _format_si(value: float, _: object = None) -> str:
    """Format a tick of a large count: 1.25M, 300k."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{suffix}"
    return f"{value:g}"


def _format_points(value: float, _: object = None) -> str:
    """Format a difference of shares in percentage points."""
    return f"{round(100 * value):+d}".replace("-", "\N{MINUS SIGN}") if round(100 * value) else "0"
