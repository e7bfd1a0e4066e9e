"""Text to measure a model on: read its documents, and assign names to splits."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from allocator.core.errors import UserError

SPLITS = ("calibration", "search", "selection", "test")

LONGEST_LIBRARY_DOCUMENT = 16 * 1024
"""Largest number of bytes used of one standard-library file. It keeps single files from dominating."""

SHORTEST_LIBRARY_FILE = 512
"""Standard-library files with fewer bytes are skipped."""

LIBRARY = "python"
"""What a user names as text for the standard library."""

_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_EXCLUDED_FOLDERS |= {"__pycache__", "encodings", "pydoc_data", "lib2to3"}
_FOLDER_SUFFIXES = (".txt", ".jsonl", ".py", ".md")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its name. The name decides its split and its place in the order."""

    name: str
    text: str


def choose_split(name: str) -> str:
    """Return the split of a document. Only the hash of its name decides it.

    Args:
        name: The document's name, a POSIX relative path.

    Returns:
        One of `SPLITS`: 6 % search, 4 % selection, 10 % test, the rest calibration.
    """
    share = int.from_bytes(hash_name(name)[:6], "big") / 2**48
    if share < 0.06:
        return "search"
    if share < 0.10:
        return "selection"
    return "test" if share < 0.20 else "calibration"


def read_standard_library() -> list[Document]:
    """Read the running interpreter's standard library, without its tests.

    Returns:
        The Python files. Each is cut at a line end to at most `LONGEST_LIBRARY_DOCUMENT` bytes. They are sorted by the
        hash of their names, so the first documents are a random sample of the files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in _list_library_files(root):
        data = path.read_bytes()
        if len(data) < SHORTEST_LIBRARY_FILE:
            continue
        if len(data) > LONGEST_LIBRARY_DOCUMENT:
            data = data[: data.rfind(b"\n", 0, LONGEST_LIBRARY_DOCUMENT) + 1]
        try:
            documents.append(Document(path.relative_to(root).as_posix(), data.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    return sort_by_hash(documents)


def _list_library_files(root: Path) -> Iterator[Path]:
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _EXCLUDED_FOLDERS and not name.startswith("config-")]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def read_documents(path: Path | None) -> list[Document]:
    """Read the documents at a path.

    Args:
        path: One of these:

            - a `.jsonl` file, with one document per line under the key "text"
            - a text file, which is one document
            - a folder of `.jsonl` and text files (`.txt`, `.py`, `.md`). It is read recursively
            - a folder that Hugging Face `datasets` saved, with one document per row in the column "text"
            - None, or the word ``python`` if there is no such file, for the standard library

    Returns:
        The documents, sorted by the hash of their names. So the first ones are a random sample.

    Raises:
        UserError: The path is missing, a file cannot be parsed, or there is no document.
    """
    if path is None or names_library(path):
        documents = read_standard_library()
    elif path.is_dir():
        documents = sort_by_hash(_read_folder(path))
    elif path.is_file():
        documents = sort_by_hash(_read_file(path, path.name))
    else:
        raise UserError(f"text: {path} does not exist; give a .jsonl file, a text file or a folder of them")
    if not documents:
        raise UserError(
            f"text: no documents in {path or 'the standard library'}; "
            f"give text that is not empty, in files ending in {', '.join(_FOLDER_SUFFIXES)}"
        )
    return documents


def names_library(path: Path) -> bool:
    """Whether a path is the word for the standard library, and no file has that name."""
    return str(path) == LIBRARY and not path.exists()


def list_text_files(path: Path) -> list[Path]:
    """List the files from which the documents at a path are read."""
    if path.is_file():
        return [path]
    every = [inside for inside in sorted(path.rglob("*")) if inside.is_file()]
    return every if (path / "dataset_info.json").exists() else [f for f in every if f.suffix in _FOLDER_SUFFIXES]


def hash_name(name: str) -> bytes:
    """Return the hash of a name, which decides a split and a place in the order."""
    return hashlib.sha256(name.encode("utf-8")).digest()


class Named(Protocol):
    """Anything with a name. The name decides its split and its place in the order."""

    @property
    def name(self) -> str:
        """A POSIX relative path, perhaps with a number after it."""


Something = TypeVar("Something", bound=Named)


def sort_by_hash(documents: Iterable[Something]) -> list[Something]:
    """Sort documents or other examples by the hash of their names."""
    return sorted(documents, key=lambda document: (hash_name(document.name), document.name))


def _read_folder(folder: Path) -> Iterator[Document]:
    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise UserError(f"text: {folder} holds several data sets; name one of its folders: {splits}")
    if (folder / "dataset_info.json").exists():
        yield from _read_dataset(folder)
        return
    for path in list_text_files(folder):
        yield from _read_file(path, path.relative_to(folder).as_posix())


def _read_dataset(folder: Path) -> Iterator[Document]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(
            f"text: {folder} was saved by Hugging Face datasets, which is not installed; "
            "install it with: pip install 'allocator[datasets]'"
        ) from None
    rows = load_from_disk(str(folder))
    if "text" not in rows.column_names:
        raise UserError(
            f'text: {folder} has no column "text" (found {rows.column_names}); rename one with rename_column'
        )
    for number, text in enumerate(rows["text"]):
        if text:
            yield Document(f"row#{number}", text)


def _read_file(path: Path, name: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"text: {path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    if path.suffix == ".jsonl":
        yield from _read_json_lines(path, name, text)
        return
    if text:
        yield Document(name, text)


def _read_json_lines(path: Path, name: str, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = parse_json_line(path, number, line)
        content = record.get("text") if isinstance(record, dict) else None
        if type(content) is not str:
            found = f"the keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f'text: {path}, line {number} has no string under the key "text" (found {found}); '
                'write each line as {"text": "..."}'
            )
        if content:
            yield Document(f"{name}#{number}", content)


def parse_json_line(path: Path, number: int, line: str) -> Any:
    """Parse a line of a .jsonl file.

    Raises:
        UserError: The line is not JSON. The message names the file and the line.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"text: {path}, line {number} is not JSON ({error}); put one JSON object on each line"
        ) from None
