"""A race on growing, nested token sets: whoever is surely worse than the centre, or than the leaders, drops out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.core.space import Allocation
from allocator.searchers.generator import Steps
from allocator.searchers.surrogates.memory import Memory

_DOUBT = 1.0
"""Deviations by which an entrant must be worse than the centre to drop out."""


def race(memory: Memory, entrants: Sequence[Allocation], keep: int) -> Steps:
    """Measure entrants at rising fidelities, fewer at each; the model sees all differences from the centre.

    Every entrant is compared with the centre on the same sequences, the model learns, and weighs what was measured on
    few tokens against what it expects itself. Entrants that are not, within that doubt, better than the centre drop
    out. Of the others the best ``keep`` reach the last fidelity, twice as many the one before.

    Args:
        memory: Where the centre is, and what is known.
        entrants: New allocations. They race on all fidelities but the first, which is for single steps.
        keep: How many may reach the last fidelity.
    """
    alive = list(entrants)
    rungs = memory.tokens[1:] or memory.tokens
    for place, tokens in enumerate(rungs, start=1):
        if not alive:
            return
        found = yield from memory.compare(alive, tokens)
        if place == len(rungs):
            return
        value_n = np.array([one.value for one in found])
        mean_n, deviation_n = memory.surrogate.estimate(np.array(alive), value_n, tokens)
        ranked = sorted(
            zip(mean_n.tolist(), deviation_n.tolist(), alive, strict=True), key=lambda one: (one[0], one[2])
        )
        hopeful = [allocation for mean, deviation, allocation in ranked if mean <= _DOUBT * deviation]
        alive = hopeful[: keep * 2 ** (len(rungs) - 1 - place)]
