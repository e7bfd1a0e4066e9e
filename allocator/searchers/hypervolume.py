"""The hypervolume of a front during its search, against a reference point from the search's first batch.

Two points span a box. The hypervolume is the share of this box that the front dominates.

The ideal point has the costs of the sparsest model, and 0 for each distance from the dense model. A likelihood never
comes near 0, so the ideal point has its lowest value in the journal's first batch. If a likelihood is an objective, the
first batch measures the dense model too.

The reference point has the costs of the dense model, and the worst measurements of the first batch. This batch measures
uniform allocations, with which every search of a front begins. An outcome that is worse than the reference point in any
figure adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np
from pymoo.indicators.hv import HV

from allocator.core.costs import from_units
from allocator.core.effort import candidate_tokens
from allocator.core.front import figure, pareto_front
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The state after a batch of ``size`` outcomes; the other figures count from the journal's beginning."""

    size: int
    evaluations: int
    tokens: float
    front: list[Outcome]
    volume: float


_BEGUN = _Step(size=0, evaluations=0, tokens=0.0, front=[], volume=0.0)


def is_likelihood(name: str) -> bool:
    """Whether a figure is a negative log-likelihood, of all the text or of a domain."""
    return name.partition(".")[0] == "nll"


def box(journal: Journal, objectives: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ideal and the reference point, [objectives] each. See the module's text."""
    space, begun = journal.space, [outcome for outcome in journal.batches[0] if not outcome.failed]
    points = [
        (space.cost(space.sparsest, name), space.cost(space.dense, name))
        if name in space.fixed
        else (
            min(outcome.measured[name] for outcome in begun) if is_likelihood(name) else 0.0,
            max(outcome.measured[name] for outcome in begun),
        )
        for name in objectives
    ]
    ideal, reference = np.array(points, dtype=float).T
    return ideal, reference


class Hypervolume:
    """The hypervolume of a journal's front, batch by batch. Each batch is processed once.

    Args:
        journal: The journal of a search of a front. It may grow.
        objectives: Names of what is minimised: costs and measurements.
        tokens: The fidelity of the outcomes that make up the front.
    """

    def __init__(self, journal: Journal, objectives: Sequence[str], tokens: int) -> None:
        self._journal, self._objectives, self._tokens = journal, objectives, tokens
        self._steps: list[_Step] = []

    def curve(self) -> list[tuple[int, int, float]]:
        """Return evaluations, candidate-tokens and hypervolume after every batch, from the journal's beginning."""
        batches = self._journal.batches
        if self._steps and self._steps[-1].size < len(batches[len(self._steps) - 1]):  # a kill had cut this batch short
            self._steps.pop()
        for batch in batches[len(self._steps) :]:
            self._steps.append(self._after(self._steps[-1] if self._steps else _BEGUN, batch))
        return [(step.evaluations, round(step.tokens), step.volume) for step in self._steps]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``front.json``: the ideal and the reference point, the hypervolume, and its curve.

        At least one batch must have been measured.
        """
        space, curve = self._journal.space, self.curve()
        ideal, reference = (
            {
                name: from_units(name, int(value)) if name in space.fixed else float(value)
                for name, value in zip(self._objectives, point, strict=True)
            }
            for point in box(self._journal, self._objectives)
        )
        return {"ideal": ideal, "reference": reference, "value": curve[-1][-1], "curve": curve}

    def _after(self, before: _Step, batch: Sequence[Outcome]) -> _Step:
        space, requests = self._journal.space, [outcome.request for outcome in batch]
        new = [
            outcome
            for outcome in batch
            if not outcome.failed
            and outcome.request == Request(allocation=outcome.request.allocation, tokens=self._tokens)
            and self._journal.admits(outcome.request.allocation)
        ]
        front = pareto_front(space, [*before.front, *new], self._objectives)
        return _Step(
            size=len(batch),
            evaluations=before.evaluations + len(batch),
            tokens=before.tokens + fsum(candidate_tokens(space, requests)),
            front=front,
            volume=before.volume if front == before.front else self._volume(front),
        )

    def _volume(self, front: Sequence[Outcome]) -> float:
        """Return the share of the box that a front dominates, to six digits; 0 for a flat box."""
        ideal, reference = box(self._journal, self._objectives)
        extent = reference - ideal
        if not extent.all():
            return 0.0
        figures = [[figure(self._journal.space, outcome, name) for name in self._objectives] for outcome in front]
        return round(float(HV(ref_point=np.ones(len(extent)))((np.array(figures) - ideal) / extent)), 6)
