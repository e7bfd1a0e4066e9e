"""What the measurements of a search cost in candidate-tokens, and the loss that it reached for them."""

from __future__ import annotations

from dataclasses import dataclass

from allocator.core.budget import fits
from allocator.core.effort import Trained, candidate_tokens
from allocator.core.journal import Journal
from allocator.core.outcomes import select_comparable
from allocator.core.protocols import Fidelity, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """The cost of the measurements of one split at one fidelity.

    Attributes:
        split: The split of the text.
        tokens: Tokens of one measurement.
        training: Tokens of training before it.
        blocks: Blocks that were run; 0 for the whole model.
        evaluations: The number of measurements.
        candidate_tokens: See :func:`~allocator.core.effort.candidate_tokens`.
        wall_s: Seconds inside evaluations, summed over workers.
    """

    split: str
    tokens: int
    training: int
    blocks: int
    evaluations: int
    candidate_tokens: float
    wall_s: float


def price_outcomes(journal: Journal) -> list[tuple[Outcome, float]]:
    """Return every outcome with its cost in candidate-tokens, in journal order."""
    priced: list[tuple[Outcome, float]] = []
    trained = Trained()
    for batch in journal.batches:
        requests = [outcome.request for outcome in batch]
        priced += zip(batch, candidate_tokens(journal.space, requests, trained), strict=True)
        trained.note(requests)
    return priced


def trace_convergence(journal: Journal) -> list[tuple[float, float]]:
    """Trace the lowest loss so far against the cost so far, with one point per measurement that could be the best.

    Every measurement adds to the cost. Only those of the search split at its highest fidelity and within the budget
    can be the best.

    Returns:
        Pairs of candidate-tokens spent and lowest loss, in journal order.
    """
    space = journal.space
    budget = journal.header.budget
    assert budget is not None, "the journal of a run has a budget"
    eligible = {outcome.request.key for outcome in select_comparable(journal)}
    spent, best = 0.0, float("inf")
    curve: list[tuple[float, float]] = []
    for outcome, cost in price_outcomes(journal):
        spent += cost
        if outcome.request.key in eligible and fits(space, outcome.request.allocation, budget):
            best = min(best, outcome.loss)
            curve.append((spent, best))
    return curve


def sum_spending(journal: Journal) -> list[Spending]:
    """Sum the cost of a run by split and fidelity, in the order in which they first appear."""
    groups: dict[Fidelity, list[tuple[Outcome, float]]] = {}
    for outcome, cost in price_outcomes(journal):
        groups.setdefault(outcome.request.fidelity, []).append((outcome, cost))
    return [
        Spending(
            split=split,
            tokens=tokens,
            training=training,
            blocks=blocks,
            evaluations=len(priced),
            candidate_tokens=sum(cost for _, cost in priced),
            wall_s=sum(outcome.wall_s for outcome, _ in priced),
        )
        for (split, tokens, training, blocks), priced in groups.items()
    ]
