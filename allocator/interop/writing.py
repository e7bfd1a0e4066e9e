"""Helpers for what a target writes: scripts, lines of text, and command lines for the user."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable
from importlib import resources
from pathlib import Path


def copy_script(name: str, folder: Path) -> None:
    """Copy a script that runs without this package.

    Args:
        name: Its path in ``scripts/``; a script of a single target lies in a folder of that target.
        folder: The destination.
    """
    with resources.as_file(resources.files("allocator.interop") / "scripts" / name) as path:
        shutil.copyfile(path, folder / path.name)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def format_command(*words: object) -> str:
    """Format a command line for a user to copy."""
    return shlex.join(map(str, words))
