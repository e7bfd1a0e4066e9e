"""The shape of the house: what lies at the root, how long files are, and how records are made."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import allocator

ROOT = Path(allocator.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400
MAX_POSITIONAL = 4
REGISTRIES = ("searchers/methods", "pruning/pruners", "interop/targets")
"""Packages whose registry is an index too, so that a new member is one file and one line there."""

INDEXED = [p for p in FILES if p.name == "__init__.py" and p.parent.relative_to(ROOT).as_posix() not in REGISTRIES]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_root_holds_the_door_and_nothing_else() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


def test_no_package_shares_its_name_with_a_public_function() -> None:
    packages = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert not packages & set(allocator.__all__)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_file_is_no_longer_than_four_hundred_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", INDEXED, ids=_name)
def test_a_package_says_what_is_in_it(path: Path) -> None:
    """Its docstring is an index: every module and package inside is named."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    inside = {each.stem for each in path.parent.glob("*.py")} | {
        each.parent.name for each in path.parent.glob("*/__init__.py")
    }
    missing = {name for name in inside - {"__init__", "__main__", "cli", "scripts"} if name not in text}
    assert not missing


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_records_of_five_fields_or_more_are_made_by_keyword(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(called) not in ("dataclass", "dataclasses.dataclass"):
                continue
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            keywords = {k.arg for k in decorator.keywords} if isinstance(decorator, ast.Call) else set()
            assert len(fields) <= MAX_POSITIONAL or "kw_only" in keywords, node.name
