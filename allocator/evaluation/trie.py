"""The order in which a batch of allocations is run, so that what they share is computed once.

Allocations are paths from the first block to the last that is run. Run in lexicographic order they walk a trie: each
one starts at a boundary between blocks up to which it agrees with the one before. Boundary b is what enters block b;
boundary 0 is always at hand.
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
        index: Which of the paths.
        start: The boundary to run from: 0, or one that the step before kept.
        keep: Boundaries to hold after this step, increasing: those that it started with, or passes.
    """

    index: int
    start: int
    keep: tuple[int, ...]


def plan(paths: Sequence[Path], limit: int) -> list[Step]:
    """Return steps in lexicographic order of paths.

    A boundary is kept while a later path branches off there. Beyond ``limit`` boundaries, the one with the
    fewest blocks above the next lower one is dropped, for it is the cheapest to run again; of equals the
    lowest, for it is needed last.
    """
    order = sorted(range(len(paths)), key=lambda index: paths[index])
    shared = [_shared(paths[a], paths[b]) for a, b in pairwise(order)]
    steps: list[Step] = []
    kept: tuple[int, ...] = ()
    for place, index in enumerate(order):
        start = max((b for b in kept if b <= shared[place - 1]), default=0) if place else 0
        held = [b for b in _branches(shared[place:]) if b in kept or b >= start]
        while len(held) > limit:
            held.remove(min(held, key=lambda b: (b - max((a for a in held if a < b), default=0), b)))
        kept = tuple(held)
        steps.append(Step(index, start, kept))
    return steps


def _shared(a: Path, b: Path) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _branches(shared: Sequence[int]) -> list[int]:
    """Return the boundaries above 0 at which later paths leave this one, increasing."""
    return sorted(set(takewhile(bool, accumulate(shared, min))))
