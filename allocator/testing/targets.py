"""The contract of export targets: they refuse what they cannot express, and write the same again.

::

    class TestMine(TargetContract):
        target = MyTarget()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from allocator.core.errors import UserError
from allocator.core.files import whole_folder
from allocator.interop.contract import Source, Target, check_target
from allocator.testing.models import make_source

PATTERNS = ("structured", "unstructured", "n:m")


def expresses(target: Target, source: Source) -> bool:
    """Whether a target takes a plan."""
    try:
        check_target(target, source)
    except UserError:
        return False
    return True


def read_export(folder: Path, varies: Sequence[str]) -> list[tuple[Path, bytes]]:
    """Return the files of an export, without those whose bytes vary. Each pattern of ``varies`` has files."""
    varying = {path for pattern in varies for path in folder.glob(pattern)}
    assert all([*folder.glob(pattern)] for pattern in varies)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in varying)
    return [(path.relative_to(folder), path.read_bytes()) for path in paths]


class TargetContract:
    """What every export target promises.

    Attributes:
        target: The target to test.
    """

    target: Target

    @pytest.fixture(scope="class")
    def sources(self, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Source]:
        """Return an executed plan of each pattern."""
        return {pattern: make_source(tmp_path_factory.mktemp("executed"), pattern) for pattern in PATTERNS}

    def export(self, source: Source, out: Path) -> list[str]:
        """Export as ``allocator export`` does."""
        check_target(self.target, source)
        with whole_folder(out) as partial:
            return self.target.write(source, partial)

    def test_it_says_what_it_is(self) -> None:
        """It has a name, a line of description and patterns."""
        assert self.target.name
        assert self.target.writes
        assert "\n" not in self.target.writes
        assert self.target.patterns
        assert {*self.target.patterns} <= {*PATTERNS}

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_a_plan_is_written_or_refused_before_any_work(
        self, pattern: str, sources: Mapping[str, Source], tmp_path: Path
    ) -> None:
        """A refusal is one line, and leaves nothing. An export is one folder, and says what was lost."""
        source, out = sources[pattern], tmp_path / "out"
        if not expresses(self.target, source):
            with pytest.raises(UserError, match=r"^[^\n]+$"):
                self.export(source, out)
            assert not list(tmp_path.iterdir())
            return
        lines = self.export(source, out)
        assert list(tmp_path.iterdir()) == [out]
        assert list(out.iterdir())
        assert all(isinstance(line, str) for line in lines)

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_what_is_written_is_the_same_again(
        self, pattern: str, sources: Mapping[str, Source], tmp_path: Path
    ) -> None:
        """Two exports have the same bytes, but for files that the target says vary."""
        if not expresses(self.target, sources[pattern]):
            pytest.skip("cannot be expressed")
        for name in ("one", "two"):
            self.export(sources[pattern], tmp_path / name)
        one, two = (read_export(tmp_path / name, self.target.varies) for name in ("one", "two"))
        assert one == two
