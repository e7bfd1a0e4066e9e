"""The Pareto front of a run: outcomes that no other outcome beats in both loss and cost."""

from __future__ import annotations

from collections.abc import Iterable

from allocator.core.protocols import Outcome
from allocator.core.space import SearchSpace


def pareto_front(space: SearchSpace, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the non-dominated outcomes in (parameters, loss), both minimised, from large to small.

    Of outcomes with equal parameters and equal loss the first by allocation is kept. The caller passes
    outcomes of one split and one fidelity, for only those can be compared.
    """
    ranked = sorted(outcomes, key=lambda o: (space.cost(o.request.allocation), o.loss, o.request.allocation))
    front: list[Outcome] = []
    for outcome in ranked:
        if not front or outcome.loss < front[-1].loss:
            front.append(outcome)
    return front[::-1]
