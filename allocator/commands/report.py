"""Reporting: one self-contained page about a run."""

from __future__ import annotations

from pathlib import Path

from allocator.report.page import write_report as write_page


def write_report(run: Path | str) -> Path:
    """Write ``report.html`` of a run, finished or not, and return its path.

    Args:
        run: The folder of the run.

    Raises:
        UserError: There is no run, or one of its files is damaged.
    """
    return write_page(Path(run))
