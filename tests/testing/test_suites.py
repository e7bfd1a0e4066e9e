"""The suites serve outsiders: the code of the page passes them as it is printed, and what breaks a rule fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.testing.suites import make_suites

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"

BROKEN = """
class TestBroken(SearcherContract):
    settings = RandomSettings(trials=20, batch=4, tokens=128)

    def make(self, space, budget, start, seed):
        searcher = super().make(space, budget, start, seed)
        searcher.finalists = lambda: [space.dense]
        return searcher
"""


def blocks() -> list[str]:
    """Return the Python of the page that defines classes: methods, a pruner, a target and their suites."""
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in found if re.search(r"^class ", block, re.MULTILINE)]


def run_pytest(folder: Path, *options: str) -> tuple[int, str]:
    """Run pytest on a folder without a configuration; return its exit code and what it printed."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_code_of_the_page_passes_without_a_conftest(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("\n".join(blocks()), encoding="utf-8")
    code, printed = run_pytest(tmp_path)
    assert code == 0, printed
    for suite in ("TestRandom", "TestRia", "TestBlockText"):
        assert suite in (tmp_path / "test_mine.py").read_text(encoding="utf-8")
    assert re.search(r"\d+ passed", printed)


def test_what_breaks_a_rule_fails(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("\n".join([*blocks(), BROKEN]), encoding="utf-8")
    code, printed = run_pytest(tmp_path, "-k", "TestBroken and finalists_keep_and_fill_the_budget")
    assert code == 1
    assert "5 failed" in printed
    assert "assert fits(space, allocation, budget)" in printed


def test_each_case_is_a_class_with_its_attributes() -> None:
    class Contract:
        number = 0

    suites = make_suites(Contract, {"one, twice": {"number": 1}, "2:4": {"number": 2}})
    assert {name: suite.number for name, suite in suites.items()} == {"Test_one_twice": 1, "Test_2_4": 2}
    assert all(issubclass(suite, Contract) for suite in suites.values())
    with pytest.raises(AssertionError, match="two cases have one name"):
        make_suites(Contract, {"a b": {}, "a-b": {}})
