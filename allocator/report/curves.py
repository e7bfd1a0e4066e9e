"""What a journal says, as plain numbers: the front, convergence, cost, and the allocations that have a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from allocator.core.budget import fits
from allocator.core.costs import costs_of
from allocator.core.effort import Trained, candidate_tokens
from allocator.core.errors import UserError
from allocator.core.files import read_json
from allocator.core.front import minimised, pareto_front
from allocator.core.journal import Journal
from allocator.core.protocols import Fidelity, Outcome, Request
from allocator.core.space import Allocation, SearchSpace, Unit

NAMED = ("uniform", "two_rate", "searched")
"""Allocations that ``result.json`` records unit by unit."""

LOSSES = {
    "kl": "KL, nats per token",
    "topk_kl": "top-k KL, nats per token",
    "nll": "negative log-likelihood, nats per token",
    "hidden": "relative distance of hidden states",
}
"""What a run may minimise, and its unit."""


Figures = Mapping[str, float]
"""Of a measured allocation by name: its costs, as they are written, and what was measured."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What the measurements of one split at one fidelity cost.

    Attributes:
        split: Which text was read.
        tokens: Tokens of one measurement.
        training: Tokens of training before it.
        blocks: How many were run; 0 for the whole model.
        evaluations: How many were made.
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


def comparable(journal: Journal) -> list[Outcome]:
    """Return the outcomes of the search split at its highest fidelity, after all training, in journal order.

    Where a front is searched, those alone that keep to the budget.
    """
    return [
        outcome
        for outcome in journal
        if outcome.request == _last(journal, outcome.request.allocation) and journal.admits(outcome.request.allocation)
    ]


def costs(journal: Journal) -> list[tuple[Outcome, float]]:
    """Return every outcome with what it cost in candidate-tokens, in journal order."""
    priced: list[tuple[Outcome, float]] = []
    trained = Trained()
    for batch in journal.batches:
        requests = [outcome.request for outcome in batch]
        priced += zip(batch, candidate_tokens(journal.space, requests, trained), strict=True)
        trained.note(requests)
    return priced


def objectives(journal: Journal) -> list[str]:
    """Return what a run minimises: its loss, then costs; parameters, where it names none."""
    return minimised(journal.loss, journal.header.objectives or ["params"])


def members(journal: Journal) -> list[Outcome]:
    """Return the front of a run, from the least loss to the least cost."""
    return pareto_front(journal.space, comparable(journal), objectives(journal))


def front(journal: Journal) -> dict[str, Any]:
    """Return the front of a run as ``front.json`` holds it; the journal may be ahead of that file."""
    space, names = journal.space, objectives(journal)
    points = []
    for outcome in members(journal):
        allocation = outcome.request.allocation
        again = journal.measured(Request(allocation, journal.header.selection, "selection"))
        points.append(
            {
                **costs_of(space, allocation),
                "sparsity": round(space.sparsity(allocation), 6),
                **{name: outcome.measured[name] for name in [journal.loss, *names] if name not in space.fixed},
                **({} if again is None else {"selection": again.loss}),
                "allocation": list(allocation),
            }
        )
    return {
        "schema": 2,
        "kind": "allocator.front",
        "tokens": journal.header.tokens[-1],
        "loss": journal.loss,
        "objectives": names,
        "points": points,
    }


def read_front(path: Path) -> dict[str, Any]:
    """Return the content of a ``front.json``.

    Raises:
        UserError: The file is missing, damaged, or something else.
    """
    data: dict[str, Any] = read_json(path, "front")
    if (data.get("kind"), data.get("schema")) != ("allocator.front", 2):
        raise UserError(f"{path}: not the front of a run. Restore it, or resume the run to have it again")
    return data


def cloud(journal: Journal) -> list[Figures]:
    """Return all that the front was chosen from."""
    return [_figures(journal, outcome) for outcome in comparable(journal)]


def starts(journal: Journal) -> list[Figures]:
    """Return the uniform allocations with which a search of a front begins; nothing of other searches."""
    if not journal.header.objectives or not journal.batches:
        return []
    return [_figures(journal, outcome) for outcome in journal.batches[0] if not outcome.failed]


def convergence(journal: Journal) -> list[tuple[float, float]]:
    """Return the lowest loss so far against what was spent, one point per measurement that could be the best.

    All measurements are paid for; only those of the search split, at its highest fidelity and within the
    budget, can be the best.

    Returns:
        Pairs of candidate-tokens spent and lowest loss, in journal order.
    """
    space = journal.space
    budget = journal.header.budget
    assert budget is not None, "the journal of a run has a budget"
    eligible = {outcome.request.key for outcome in comparable(journal)}
    spent, best = 0.0, float("inf")
    curve: list[tuple[float, float]] = []
    for outcome, cost in costs(journal):
        spent += cost
        if outcome.request.key in eligible and fits(space, outcome.request.allocation, budget):
            best = min(best, outcome.loss)
            curve.append((spent, best))
    return curve


def spending(journal: Journal) -> list[Spending]:
    """Return the cost of a run by split and fidelity, in the order in which they first appear."""
    groups: dict[Fidelity, list[tuple[Outcome, float]]] = {}
    for outcome, cost in costs(journal):
        groups.setdefault(outcome.request.fidelity, []).append((outcome, cost))
    return [
        Spending(
            split,
            tokens,
            training,
            blocks,
            len(priced),
            sum(cost for _, cost in priced),
            sum(outcome.wall_s for outcome, _ in priced),
        )
        for (split, tokens, training, blocks), priced in groups.items()
    ]


def training(journal: Journal) -> list[dict[str, Any]]:
    """Return what training changed, by split and fidelity, in the order in which they first appear.

    Returns:
        ``split``, ``tokens``, ``training`` (tokens), ``evaluations``; ``before`` and ``after``, the mean losses; and
        Spearman's rank correlation of the two, over the whole search (``rank_correlation``) and as the mean over
        batches of three or more (``rank_correlation_in_batch``), among which a search chooses; None where there is
        none.
    """
    groups: dict[Fidelity, list[list[tuple[float, float]]]] = {}
    for batch in journal.batches:
        pairs: dict[Fidelity, list[tuple[float, float]]] = {}
        for outcome in batch:
            if outcome.loss_before is not None:
                pairs.setdefault(outcome.request.fidelity, []).append((outcome.loss_before, outcome.loss))
        for key, own in pairs.items():
            groups.setdefault(key, []).append(own)
    lines = []
    for (split, tokens, trained, _), batches in groups.items():
        every = [pair for batch in batches for pair in batch]
        in_batch = [found for batch in batches if (found := _rank_correlation(batch)) is not None]
        lines.append(
            {
                "split": split,
                "tokens": tokens,
                "training": trained,
                "evaluations": len(every),
                "before": fmean(before for before, _ in every),
                "after": fmean(after for _, after in every),
                "rank_correlation": _rank_correlation(every),
                "rank_correlation_in_batch": fmean(in_batch) if in_batch else None,
            }
        )
    return lines


def allocations(space: SearchSpace, units: Iterable[Mapping[str, Any]]) -> dict[str, Allocation]:
    """Return the named allocations of ``result.json``, found again in the search space.

    Args:
        space: The space that was searched.
        units: The ``units`` of a result: ``name``, and ``sparsity`` by the name of an allocation.

    Raises:
        UserError: The result has other units than the space.
    """
    recorded = {unit["name"]: unit["sparsity"] for unit in units}
    if set(recorded) != {unit.name for unit in space.units}:
        raise UserError(
            "result.json: its units are not those of journal.jsonl, so the files are of two runs. "
            "Restore the one that was replaced, or run the search again"
        )
    named = [name for name in NAMED if all(name in sparsities for sparsities in recorded.values())]
    return {name: tuple(_level(unit, recorded[unit.name][name]) for unit in space.units) for name in named}


def marks(journal: Journal, named: Mapping[str, Allocation]) -> dict[str, Figures]:
    """Return the figures of named allocations, for those measured on the same text."""
    found = {name: journal.measured(_last(journal, allocation)) for name, allocation in named.items()}
    return {name: _figures(journal, outcome) for name, outcome in found.items() if outcome is not None}


def _figures(journal: Journal, outcome: Outcome) -> Figures:
    return {**costs_of(journal.space, outcome.request.allocation), **outcome.measured}


def _last(journal: Journal, allocation: Allocation) -> Request:
    """Return what a search asks last of an allocation."""
    header = journal.header
    training = 0 if header.training is None else header.training["tokens"][-1]
    return Request(allocation, header.tokens[-1], training=training)


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three pairs, or where one side is constant."""
    from scipy.stats import spearmanr

    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _level(unit: Unit, sparsity: float) -> int:
    return min(range(unit.num_levels), key=lambda level: abs(unit.sparsity(level) - sparsity))
