"""The style that all tables share."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table


def make_table(title: str) -> Table:
    """Make an empty table with a title."""
    return Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
