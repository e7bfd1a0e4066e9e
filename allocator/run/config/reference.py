"""The configuration reference: a page made of the settings' docstrings. ``make docs`` writes it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from allocator.run.config.run import RunConfig
from allocator.searchers.registry import find_sections
from allocator.searchers.settings import SearchSettings

_HEAD = """# Configuration

Every setting of a run, with its default. A run file in YAML holds them, `--set key=value` sets one, and `run.yaml` in
every run lists all of them with their values. An unknown key is an error.

This page is generated from the docstrings of the settings: `make docs` writes it again.
"""

_UNNAMED = {"workers": "one per core, at most 4"}
"""Defaults that depend on the machine."""


def render_reference() -> str:
    """Return the page in Markdown."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items() if _is_section(field)}
    parts = [_HEAD, _render_section("The run", "", RunConfig, skip=set(sections))]
    for name, kind in sections.items():
        inner = find_sections() if kind is SearchSettings else {}
        parts.append(_render_section(f"`{name}`", f"{name}.", kind, skip=set(inner)))
        parts += [_render_section(f"`{name}.{key}`", f"{name}.{key}.", own) for key, own in inner.items()]
    return "\n".join(parts)


def _is_section(field: Any) -> bool:
    kind = field.annotation
    return kind is SearchSettings or (inspect.isclass(kind) and issubclass(kind, BaseModel))


def _render_section(title: str, prefix: str, kind: Any, skip: Collection[str] = ()) -> str:
    """Return a heading, the class's first sentence and a table of its settings."""
    text = inspect.cleandoc(kind.__doc__)
    summary, words = text.split("\n\n")[0].replace("\n", " "), _read_attributes(text)
    lines = [f"## {title}\n", f"{_plain(summary)}\n", "| key | default | what it is |", "|---|---|---|"]
    for name, default in _list_defaults(kind).items():
        if name not in skip:
            shown = _UNNAMED.get(prefix + name) or f"`{json.dumps(default, default=str)}`"
            lines.append(f"| `{prefix}{name}` | {shown} | {_plain(words[name])} |")
    return "\n".join(lines) + "\n"


def _list_defaults(kind: Any) -> dict[str, Any]:
    defaults = kind()
    names = [each.name for each in fields(kind)] if is_dataclass(kind) else list(kind.model_fields)
    return {name: getattr(defaults, name) for name in names}


def _read_attributes(docstring: str) -> dict[str, str]:
    """Return the text of each line under ``Attributes``."""
    _, _, body = docstring.partition("Attributes:\n")
    entries = re.split(r"(?m)^    (?=\w+: )", body.split("\n\n")[0])
    named = (entry.partition(": ") for entry in entries if ": " in entry)
    return {name.strip(): " ".join(text.split()) for name, _, text in named}


def _plain(text: str) -> str:
    """Return a docstring's text as Markdown for one cell of a table."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?: <[^>]*>)?`", lambda match: f"`{match[1]}`", text)
    return text.replace("``", "`").replace("|", "\\|")


def main() -> None:
    """Write ``docs/configuration.md``."""
    Path("docs/configuration.md").write_text(render_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
