"""Checks of objects that users pass from Python: searchers and local pruners of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from allocator.core.errors import UserError


def check_object(given: object, keyword: str, attributes: Sequence[str]) -> None:
    """Check that an object can be used.

    Args:
        given: The object.
        keyword: The keyword argument that it was passed as.
        attributes: Names that it must have.

    Raises:
        UserError: It is a class, or it lacks an attribute.
    """
    if isinstance(given, type):
        raise UserError(
            f"{keyword}: expected an object, found the class {given.__name__}. Pass {keyword}={given.__name__}()"
        )
    missing = [name for name in attributes if not hasattr(given, name)]
    if missing:
        raise UserError(
            f"{keyword}: {type(given).__name__} lacks {', '.join(missing)}. It needs {', '.join(attributes)}; "
            "docs/extending.md shows a whole one"
        )


def make_plain(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return settings as a file gives them back: tuples become lists.

    Args:
        values: The settings by name.
        source: What they are, for the message.

    Raises:
        UserError: A value has no JSON type.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(values)))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source} cannot be recorded: {error}. Use numbers, texts, lists and dictionaries with texts as keys"
        ) from None
    return plain
