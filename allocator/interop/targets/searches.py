"""Searches, for targets that show how a plan was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.outcomes import select_comparable
from allocator.interop.contract import Source, Target


class SearchTarget(Target):
    """A tool that shows searches; it takes the run of a plan of any pattern."""

    patterns = ("structured", "unstructured", "n:m")
    any_kind = True

    def check(self, source: Source) -> None:
        """Check that there is a search, and that it has measured something.

        Raises:
            UserError: There is none.
        """
        if source.run is None:
            raise UserError(
                f"export: {self.name} shows a search, and this is a plan alone. Name the folder of a run, or a plan "
                "beside its journal.jsonl"
            )
        if not select_comparable(Journal.read(source.run / "journal.jsonl")):
            raise UserError(f"{source.run}: nothing is measured on all tokens yet. Resume the search")


def run_of(source: Source) -> Path:
    """Return the folder of the run, which was checked to be there."""
    assert source.run is not None
    return source.run


def rounds(run: Path) -> Iterator[tuple[str, Journal]]:
    """Yield the journal of every round of a search with a name for it, the last round last."""
    name = run.absolute().name
    earlier = sorted((run / "rounds").glob("*/journal.jsonl"), key=lambda path: int(path.parent.name))
    for path in earlier:
        yield f"{name}, round {path.parent.name}", Journal.read(path)
    yield name, Journal.read(run / "journal.jsonl")
