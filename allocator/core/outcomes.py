"""What a journal tells about a search: the outcomes that can be compared, the objectives, and the front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allocator.core.costs import costs_of
from allocator.core.errors import UserError
from allocator.core.files import read_json
from allocator.core.front import minimised, pareto_front
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation

FRONT_SCHEMA = 2
"""Version of the format of ``front.json``."""

_FRONT_KIND = "allocator.front"

LOSSES = {
    "kl": "KL, nats per token",
    "topk_kl": "top-k KL, nats per token",
    "nll": "negative log-likelihood, nats per token",
    "hidden": "relative distance of hidden states",
}
"""The losses that a run may minimise, each with its unit."""

Figures = Mapping[str, float]
"""The figures of one measured allocation by name: its costs, in the units in which users write them, and its
measurements."""


def select_comparable(journal: Journal) -> list[Outcome]:
    """Select the outcomes that can be compared with each other, in journal order.

    They belong to the search split at its highest fidelity, after all training. Where a front is searched, they also
    keep to the budget.
    """
    return [
        outcome
        for outcome in journal
        if outcome.request == final_request(journal, outcome.request.allocation)
        and journal.admits(outcome.request.allocation)
    ]


def final_request(journal: Journal, allocation: Allocation) -> Request:
    """Return the last request that a search makes for an allocation: highest fidelity, after all training."""
    training = 0 if journal.header.training is None else journal.header.training["tokens"][-1]
    return Request(allocation=allocation, tokens=journal.header.tokens[-1], training=training)


def list_objectives(journal: Journal) -> list[str]:
    """List what a run minimises: its loss, then costs. The cost is ``params`` where the run names none."""
    return minimised(journal.loss, journal.header.objectives or ["params"])


def collect_figures(journal: Journal, outcome: Outcome) -> Figures:
    """Return the costs and the measurements of an outcome by name."""
    return {**costs_of(journal.space, outcome.request.allocation), **outcome.measured}


def find_front(journal: Journal) -> list[Outcome]:
    """Find the front of a run, from the lowest loss to the lowest cost."""
    return pareto_front(journal.space, select_comparable(journal), list_objectives(journal))


def build_front(journal: Journal) -> dict[str, Any]:
    """Build the content of ``front.json`` from the journal, which may be ahead of that file."""
    space, names = journal.space, list_objectives(journal)
    points = []
    for outcome in find_front(journal):
        allocation = outcome.request.allocation
        selection = journal.measured(Request(allocation=allocation, tokens=journal.header.selection, split="selection"))
        points.append(
            {
                **costs_of(space, allocation),
                "sparsity": round(space.sparsity(allocation), 6),
                **{name: outcome.measured[name] for name in [journal.loss, *names] if name not in space.fixed},
                **({} if selection is None else {"selection": selection.loss}),
                "allocation": list(allocation),
            }
        )
    return {
        "schema": FRONT_SCHEMA,
        "kind": _FRONT_KIND,
        "tokens": journal.header.tokens[-1],
        "loss": journal.loss,
        "objectives": names,
        "points": points,
    }


def read_front(path: Path) -> dict[str, Any]:
    """Read a ``front.json``.

    Raises:
        UserError: The file is missing, damaged, or not a front of this version.
    """
    data: dict[str, Any] = read_json(path, "front")
    if (data.get("kind"), data.get("schema")) != (_FRONT_KIND, FRONT_SCHEMA):
        raise UserError(f"{path}: not the front of a run. Restore it, or resume the run, which writes it again")
    return data
