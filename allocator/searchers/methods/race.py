"""A race on growing, nested token sets. Entrants that are surely worse than the centre or the leaders drop out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.core.space import Allocation
from allocator.searchers.generator import Steps
from allocator.searchers.surrogates.memory import Memory

_DOUBT = 1.0
"""How many deviations worse than the centre an entrant must be to drop out."""


def race(memory: Memory, entrants: Sequence[Allocation], keep: int) -> Steps:
    """Measure entrants at rising fidelities, fewer at each, and show all differences from the centre to the model.

    Every entrant is compared with the centre on the same sequences. The model learns from the difference, and weighs
    measurements on few tokens against its own expectation. Entrants that are surely worse than the centre drop out. Of
    the others, the best ``keep`` reach the last fidelity, and twice as many the fidelity before.

    Args:
        memory: Holds the centre and the model.
        entrants: New allocations. They race on all fidelities but the first, which is for single steps.
        keep: Most entrants that reach the last fidelity.
    """
    alive = list(entrants)
    rungs = memory.tokens[1:] or memory.tokens
    for rung, tokens in enumerate(rungs, start=1):
        if not alive:
            return
        differences = yield from memory.compare(alive, tokens)
        if rung == len(rungs):
            return
        value_n = np.array([difference.value for difference in differences])
        mean_n, deviation_n = memory.surrogate.estimate(np.array(alive), value_n, tokens)
        ranked = sorted(
            zip(mean_n.tolist(), deviation_n.tolist(), alive, strict=True), key=lambda one: (one[0], one[2])
        )
        hopeful = [allocation for mean, deviation, allocation in ranked if mean <= _DOUBT * deviation]
        alive = hopeful[: keep * 2 ** (len(rungs) - 1 - rung)]
