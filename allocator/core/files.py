"""Files that are either whole or absent, and fingerprints of their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allocator.core.errors import UserError


def canonical_json(value: Any) -> str:
    """Serialise a value so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return ``sha256:<hex>`` of a JSON-serialisable value."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return ``sha256:<hex>`` of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file through a temporary one in the same folder, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, with keys in their order."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_new_folder(out: Path) -> None:
    """Check that nothing exists at ``out`` and that a folder can be made there.

    Raises:
        UserError: Something exists, or no folder can be made.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already. Name another folder with --out, or remove it")
    check_place(out, "Name another folder with --out")


def check_apart(out: Path, folder: Path, what: str) -> None:
    """Check that a new folder is not inside another one, which is the ``what`` that a command reads.

    Raises:
        UserError: It is inside.
    """
    if folder.resolve() in out.resolve().parents:
        raise UserError(f"{out}: lies inside of {what} {folder}, which stays as it is. Name another folder with --out")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``out``. It is renamed to ``out`` at the end, and removed after an error.

    Raises:
        UserError: Something exists at ``out``, or no folder can be made there.
    """
    check_new_folder(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_file(path: Path, flag: str) -> None:
    """Check that a file can be written at a path that the user gave with a flag.

    Raises:
        UserError: The path is a folder, or its folder does not exist.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{path}: no file can be written there. Name a file in a folder that exists with {flag}")


def check_name(name: str, where: object) -> None:
    """Check that the name of a module or file, read from a file, cannot lead out of its folder.

    Raises:
        UserError: It is not a plain name. ``where`` says which file holds it.
    """
    if not name or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise UserError(f"{where}: {name!r} is not a name of a module or file of this folder. Restore the file")


def check_place(path: Path, remedy: str) -> None:
    """Check that a folder at ``path`` exists and is writable, or could be made.

    Raises:
        UserError: The path, or its nearest existing parent, is not a writable folder.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: not a folder that can be written to. {remedy}")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON object from a file, which errors call ``what``.

    Raises:
        UserError: The file is missing, cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a {what} is a file, and this is a folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the {what}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable {what}: {error}. Restore it or make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a {what} is a JSON object, found {type(value).__name__}. Restore it or make it again")
    return value
