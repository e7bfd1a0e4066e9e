"""The Pareto front of a run: outcomes that no other outcome beats in every objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from allocator.core.protocols import Outcome
from allocator.core.space import SearchSpace


def figure(space: SearchSpace, outcome: Outcome, name: str) -> float:
    """Return a figure of an outcome by name: a cost of its allocation, or what was measured."""
    return space.cost(outcome.request.allocation, name) if name in space.fixed else outcome.measured[name]


def pareto_front(space: SearchSpace, outcomes: Iterable[Outcome], objectives: Sequence[str]) -> list[Outcome]:
    """Return the non-dominated outcomes, all objectives minimised, in the order of the first one.

    Of outcomes with equal figures the first by allocation is kept. The caller passes outcomes of one split and one
    fidelity, for only those can be compared.
    """
    ranked = sorted(
        (tuple(figure(space, outcome, name) for name in objectives), outcome.request.allocation, place, outcome)
        for place, outcome in enumerate(outcomes)
    )
    front: list[Outcome] = []
    figures = np.empty((len(ranked), len(objectives)))
    for values, _, _, outcome in ranked:  # whatever beats an outcome comes before it
        if not (figures[: len(front)] <= values).all(axis=1).any():
            figures[len(front)] = values
            front.append(outcome)
    return front


def knee(figures: np.ndarray) -> int:
    """Return the member of a front where it bends.

    Args:
        figures: Of each member, [members, objectives], all minimised.

    Returns:
        The place of the member with the least sum of figures, each scaled to [0, 1] over the front.
    """
    low, high = figures.min(axis=0), figures.max(axis=0)
    scaled = (figures - low) / np.where(high > low, high - low, 1.0)
    return int(scaled.sum(axis=1).argmin())
