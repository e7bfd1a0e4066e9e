"""The status of a run as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from allocator.report.tables.formats import format_plural


def format_status(status: Mapping[str, Any]) -> str:
    """Format the status that :func:`allocator.run.status.read_status` returns, one line per entry."""
    state, age = status["state"], _format_duration(status["age_s"])
    states = {
        "running": f"running, last sign {age} ago",
        "lost": f"not running: no process writes this run, last sign {age} ago",
    }
    total, left = status["total"], status.get("phase_left_s")
    phase = f"{status['phase']}, {status['done']} of {total}" if total else status["phase"]
    of_round = " in this round" if "/" in status["phase"] else ""  # as in "search 2/2"
    measured = f"{format_plural(status.get('evaluations', 0), 'allocation')}{of_round}"
    pace = status.get("evaluations_per_s")
    lines = {
        "state": states.get(state, f"{state} {age} ago"),
        "error": status.get("error", ""),
        "phase": ""
        if state == "finished"
        else phase
        if left is None or state != "running"
        else f"{phase}, about {_format_duration(left)} left",
        "measured": measured if pace is None or state != "running" else f"{measured}, {pace:.3g} per second",
        **{name: f"{value:.4f}" for name, value in status.get("reached", {}).items()},
        "front": format_plural(status["front"], "member") if "front" in status else "",
        "workers": f"{status['workers']} alive" if status.get("workers") and state == "running" else "",
    }
    return "\n".join(f"{name:<11} {escape(text)}" for name, text in lines.items() if text)


def _format_duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
