"""The order in which a batch of allocations is run, so that shared blocks are computed once.

An allocation is a path from the first block to the last block that is run. Paths are run in lexicographic order, which
walks a trie. A path shares its first blocks with the path before it, and starts after them, at a boundary between
blocks. Boundary b is the input of block b. Boundary 0 is always available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile

Path = tuple[tuple[int, ...], ...]
"""The levels of each block's units, from the first block to the last that is run."""


@dataclass(frozen=True, slots=True)
class Step:
    """One path to run.

    Attributes:
        index: Index of the path.
        start: The boundary to run from: 0, or one that the step before kept.
        keep: Boundaries to keep after this step, increasing. The step before kept them, or this step computes them.
    """

    index: int
    start: int
    keep: tuple[int, ...]


def plan(paths: Sequence[Path], limit: int) -> list[Step]:
    """Return steps in lexicographic order of paths.

    A boundary is kept while a later path branches off there. At most ``limit`` boundaries are kept. If there are more,
    the boundary with the fewest blocks since the kept one below it is dropped, because it is the cheapest to compute
    again. Of equally cheap ones, the lowest is dropped, because it is needed last.
    """
    order = sorted(range(len(paths)), key=lambda index: paths[index])
    shared = [_shared(paths[a], paths[b]) for a, b in pairwise(order)]
    steps: list[Step] = []
    kept: tuple[int, ...] = ()
    for position, index in enumerate(order):
        start = max((b for b in kept if b <= shared[position - 1]), default=0) if position else 0
        keep = [b for b in _branches(shared[position:]) if b in kept or b >= start]
        while len(keep) > limit:
            keep.remove(min(keep, key=lambda b: (b - max((a for a in keep if a < b), default=0), b)))
        kept = tuple(keep)
        steps.append(Step(index, start, kept))
    return steps


def _shared(a: Path, b: Path) -> int:
    """Return the number of first blocks in which two paths agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _branches(shared: Sequence[int]) -> list[int]:
    """Return the boundaries above 0 at which later paths branch off this one, increasing."""
    return sorted(set(takewhile(bool, accumulate(shared, min))))
