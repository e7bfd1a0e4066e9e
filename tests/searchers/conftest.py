"""Landscapes in place of a model: losses that are functions of the allocation alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from allocator.core.budget import budget_for
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import FEATURES, Outcome, Request
from allocator.searchers.loop import Measurer, search
from allocator.searchers.rules.baselines import uniform


class Landscape:
    """A KL that grows with every level, plus what neighbouring units do to each other."""

    def __init__(self, space, seed=0, interaction=0.3):
        rng = np.random.default_rng(seed)
        self.terms = [np.concatenate([[0.0], rng.exponential(size=u.num_levels - 1).cumsum()]) for u in space.units]
        self._interaction, self._space = interaction, space
        self.requests: list[Request] = []

    def kl(self, allocation) -> float:
        sparsities = [u.sparsity(level) for u, level in zip(self._space.units, allocation, strict=True)]
        pairs = sum(a * b for a, b in itertools.pairwise(sparsities))
        return float(sum(t[level] for t, level in zip(self.terms, allocation, strict=True)) + self._interaction * pairs)

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        for request in requests:
            self.requests.append(request)
            kl = self.kl(request.allocation) * (1 + 1 / request.tokens)
            if request.blocks:
                levels = zip(self._space.units, request.allocation, strict=True)
                assert not any(level for unit, level in levels if unit.block >= request.blocks)
                yield Outcome(request=request, measured={FEATURES: kl}, wall_s=0.0, loss_name=FEATURES)
                continue
            after = {"kl": kl / 2, "kl_before": kl} if request.training else {"kl": kl}
            yield Outcome(request=request, measured={**after, "nll": 2.0 + kl, **self._influences(request)}, wall_s=0.0)

    def _influences(self, request) -> dict[str, float]:
        """What blocks still do grows with the density of their units."""
        blocks: dict[str, float] = {}
        for unit, level in zip(self._space.units, request.allocation if request.probe else (), strict=False):
            key = f"influence.{unit.block}"
            blocks[key] = blocks.get(key, 0.0) + (1.0 - unit.sparsity(level)) * (1 + unit.block % 3)
        return blocks


class Refusing:
    """Answers nothing: whatever is asked should have been known."""

    def evaluate(self, requests):
        raise AssertionError(f"asked to measure {requests}")


class Recording:
    """Writes down what a searcher asks and is told."""

    def __init__(self, searcher):
        self._searcher = searcher
        self.batches: list[list[Request]] = []
        self.told: list[list[Outcome]] = []

    def ask(self):
        requests = self._searcher.ask()
        if requests:
            self.batches.append(list(requests))
        return requests

    def tell(self, outcomes):
        self.told.append(list(outcomes))
        self._searcher.tell(outcomes)

    def ended(self):
        return self._searcher.ended()

    def finalists(self):
        return self._searcher.finalists()


@pytest.fixture
def landscape():
    return Landscape


@pytest.fixture
def refusing():
    return Refusing()


@pytest.fixture
def run(tmp_path, landscape):
    """Runs a searcher from uniform to its end and returns its record; ``known`` is in the journal before."""

    def run(make, space, target=0.5, seed=0, evaluator=None, known=(), start=None):
        budget = budget_for(space, target)
        start = [uniform(space, budget)] if start is None else start
        record = Recording(make(space, budget, start, seed))
        path = tmp_path / f"journal{len(list(tmp_path.iterdir()))}.jsonl"
        with Journal.create(path, JournalHeader(space=space)) as journal:
            for outcome in known:
                journal.append(outcome)
            search(record, Measurer(evaluator or landscape(space), journal))
        return record

    return run
