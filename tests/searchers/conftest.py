"""Landscapes in place of a model: losses that are functions of the allocation alone."""

from __future__ import annotations

import pytest

from allocator.core.budget import budget_for
from allocator.searchers.rules.baselines import uniform
from allocator.testing.landscapes import Chain
from allocator.testing.runs import Refusing, run_search


@pytest.fixture
def landscape():
    return Chain


@pytest.fixture
def refusing():
    return Refusing()


@pytest.fixture
def run(tmp_path, landscape):
    """Runs a searcher from uniform to its end and returns its record; ``known`` is in the journal before."""

    def run(make, space, target=0.5, seed=0, evaluator=None, known=(), start=None):
        budget = budget_for(space, target)
        start = [uniform(space, budget)] if start is None else start
        return run_search(make(space, budget, start, seed), space, evaluator or landscape(space), tmp_path, known)

    return run
