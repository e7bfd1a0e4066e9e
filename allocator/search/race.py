"""A race on growing, nested token sets: whoever is surely worse than the centre, or than the leaders, drops out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from allocator.core.space import Allocation
from allocator.search.script import Memory, Steps

_DOUBT = 1.0
"""Standard errors by which a difference must be on the wrong side for an entrant to drop out."""


def race(memory: Memory, entrants: Sequence[Allocation], keep: int) -> Steps:
    """Measure entrants at rising fidelities, fewer at each; the model sees all differences from the centre.

    Every entrant is compared with the centre on the same sequences. The spread of such differences over sequences,
    pooled over all that were measured, gives their standard error; entrants that are not, within it, better than the
    centre drop out. Of the others the best ``keep`` reach the last fidelity, twice as many the one before.

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
        blur_n = memory.surrogate.blur(np.array(alive), tokens)
        hopeful = [one for one, blur in zip(found, blur_n.tolist(), strict=True) if one.value <= _DOUBT * blur]
        if os.environ.get('RANK') and tokens < memory.tokens[-1]:
            memory.surrogate.refresh(memory.centre)
            P = memory.surrogate.predict(np.array(alive)); M = memory.surrogate.misfit(np.array(alive))
            est = {o.allocation: (o.value*m**2+p*b**2)/(m**2+b**2+1e-300) for o,p,m,b in zip(found,P.tolist(),M.tolist(),blur_n.tolist())}
            ranked = sorted(found, key=lambda one: (est[one.allocation], one.allocation))
        else: ranked = sorted(hopeful, key=lambda one: (one.value, one.allocation))
        stages_left = len(rungs) - 1 - place
        alive = [one.allocation for one in ranked[: keep * 2 ** max(0, stages_left)]]
