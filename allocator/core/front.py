"""The Pareto front of a run: the outcomes that no other outcome beats in every objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from allocator.core.costs import COSTS
from allocator.core.protocols import Outcome
from allocator.core.space import SearchSpace


def minimised(loss: str, objectives: Sequence[str]) -> list[str]:
    """Return the names that a search minimises: the loss, or the losses of domains in its place; then other figures."""
    measured = [name for name in objectives if name not in COSTS]
    apart = any(name.startswith(f"{loss}.") for name in measured)
    return [*([] if apart else [loss]), *measured, *(name for name in objectives if name in COSTS)]


def figure(space: SearchSpace, outcome: Outcome, name: str) -> float:
    """Return a figure of an outcome by name: a cost of its allocation, or a measurement."""
    return space.cost(outcome.request.allocation, name) if name in space.fixed else outcome.measured[name]


def pareto_front(space: SearchSpace, outcomes: Iterable[Outcome], objectives: Sequence[str]) -> list[Outcome]:
    """Return the non-dominated outcomes, all objectives minimised, in the order of the first objective.

    Of outcomes with equal figures, the first by allocation is kept. Outcomes must be of one split and one fidelity,
    because others cannot be compared.
    """
    ranked = sorted(outcomes, key=lambda outcome: outcome.request.allocation)
    figures = [[figure(space, outcome, name) for name in objectives] for outcome in ranked]
    return [ranked[place] for place in non_dominated(np.array(figures).reshape(len(ranked), len(objectives)))]


def non_dominated(figures: np.ndarray) -> list[int]:
    """Return the indices of the candidates that no other beats, in the order of their figures; of equals the first.

    Args:
        figures: Figures of each candidate, [candidates, figures], all minimised.
    """
    order = np.lexsort(figures.T[::-1])  # a candidate that beats another comes before it
    found: list[int] = []
    best = np.empty_like(figures)
    for place in order.tolist():
        if not (best[: len(found)] <= figures[place]).all(axis=1).any():
            best[len(found)] = figures[place]
            found.append(place)
    return found


def knee(figures: np.ndarray, ideal: np.ndarray, reference: np.ndarray) -> int:
    """Return the index of the member at the bend of a front: that of least sum of scaled figures.

    Figures are scaled from the ideal to the reference point. The ends of the front would be a poor scale, because its
    sparsest member may have lost everything.

    Args:
        figures: Figures of each member, [members, objectives], all minimised.
        ideal: The best conceivable figures, [objectives].
        reference: The worst useful figures, [objectives].
    """
    extent = reference - ideal
    return int(((figures - ideal) / np.where(extent > 0, extent, 1.0)).sum(axis=1).argmin())
