"""Run options as flags of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from allocator.run.config.options import list_flags


def take_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add run options as flags to a command, which takes them as ``**options``."""
    flags = list_flags()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in declared if p.kind is not p.VAR_KEYWORD]
        for name in names:
            kind, flag = flags[name]
            words = f"{flag.help} [default: {flag.default}]" if flag.default else flag.help
            spelling = flag.name or f"--{name.replace('_', '-')}"
            option = typer.Option(spelling, metavar=flag.metavar or None, help=words)
            value = (
                list[str] | None if kind == Sequence[str] | None else Path | None if Path in get_args(kind) else kind
            )
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[value, option]))

        @wraps(command)
        def run(**values: Any) -> None:
            # a flag that may be repeated and is not given is an empty list
            command(**{name: None if name in names and value == [] else value for name, value in values.items()})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate
