"""The formats of ``result.json`` and ``compare.json``, and the reader of ``result.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allocator.core.errors import UserError
from allocator.core.files import read_json

RESULT_SCHEMA = 3
"""Version of the format of ``result.json``."""

RESULT_KIND = "allocator.result"

COMPARISON_SCHEMA = 3
"""Version of the format of ``compare.json``."""

COMPARISON_KIND = "allocator.comparison"

Figures = dict[str, float]
"""Measured figures of one checkpoint, by name."""


def read_result(path: Path) -> dict[str, Any] | None:
    """Read a ``result.json``; None for a run that is not finished.

    Raises:
        UserError: The file is damaged, or not a result of this version.
    """
    if not path.exists():
        return None
    result: dict[str, Any] = read_json(path, "result")
    if (result.get("kind"), result.get("schema")) != (RESULT_KIND, RESULT_SCHEMA):
        raise UserError(f"{path}: not the result of a run of this version. Restore it, or run the search again")
    return result
