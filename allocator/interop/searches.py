"""The part that targets share which show how a plan was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.outcomes import select_comparable
from allocator.interop.contract import Source, Target


class SearchTarget(Target):
    """A tool that shows searches. It takes the run of a plan of any pattern."""

    patterns = ("structured", "unstructured", "n:m")
    any_kind = True

    def check(self, source: Source) -> None:
        """Check that there is a search with comparable measurements.

        Raises:
            UserError: There is not.
        """
        if source.run is None:
            raise UserError(
                f"export: {self.name} shows a search, and this is only a plan. Name the folder of a run, or a plan "
                "next to its journal.jsonl"
            )
        if not select_comparable(Journal.read(source.run / "journal.jsonl")):
            raise UserError(f"{source.run}: nothing was measured on all tokens yet. Resume the search")


def require_run(source: Source) -> Path:
    """Return the folder of the run; :meth:`SearchTarget.check` made sure that there is one."""
    assert source.run is not None
    return source.run


def iterate_rounds(run: Path) -> Iterator[tuple[str, Journal]]:
    """Iterate over the rounds of a search in order: a name and the journal of each."""
    name = run.absolute().name
    earlier = sorted((run / "rounds").glob("*/journal.jsonl"), key=lambda path: int(path.parent.name))
    for path in earlier:
        yield f"{name}, round {path.parent.name}", Journal.read(path)
    yield name, Journal.read(run / "journal.jsonl")
