"""The contract of search methods that minimise the loss within a budget.

::

    class TestMine(SearcherContract):
        settings = MySettings(trials=20, tokens=128)

Sizes should be small: a suite runs some forty searches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from allocator.core.budget import Budget, budget_for, denser_moves, fits, repair
from allocator.core.protocols import AllocationEvaluator, Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.settings import SearchSettings
from allocator.testing.landscapes import Chain, bowl
from allocator.testing.runs import Failing, Recording, Shuffled, run_search
from allocator.testing.spaces import make_six_units, make_space, make_uneven_space

ODD_LADDERS = {
    "one unit": [[100, 80, 60, 40, 20, 0]],
    "one unit of two levels": [[100, 50]],
    "one unit that moves": [[50], [40], [90, 60, 30, 0], [10]],
    "unequal costs": [[1000, 1], [3, 2, 1, 0], [77, 11], [500, 499, 3]],
    "all alike": [[7, 0]] * 12,
}


class Landscape(AllocationEvaluator, Protocol):
    """A loss that is a function of the allocation. It records the requests."""

    requests: list[Request]

    def kl(self, allocation: Allocation) -> float:
        """Return the loss of an allocation."""
        ...


class SearcherContract:
    """What every search method promises.

    Attributes:
        settings: The settings to test.
        draws: Whether another seed gives another search.
        expansions: Whether the evaluator has gradients, and answers requests for expansions.
    """

    settings: MethodSettings
    draws: bool = True
    expansions: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the last fidelity."""
        return self.settings.fidelities[-1]

    def make(self, space: SearchSpace, budget: Budget, start: Sequence[Allocation], seed: int) -> Searcher:
        """Return the searcher of a problem."""
        return self.settings.make(SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=seed))

    def landscape(self, space: SearchSpace) -> Landscape:
        """Return the evaluator of a space."""
        if not self.expansions:
            return Chain(space)
        return bowl(0, reach=3, space=space, length=max(1, self.tokens // 8))

    @pytest.fixture
    def space(self) -> SearchSpace:
        """Return six units of unequal ladders."""
        return make_six_units()

    def run(self, folder: Path, space: SearchSpace, target: float = 0.5, seed: int = 0, **more: Any) -> Recording:
        """Search from uniform to the end; further arguments are those of :func:`~allocator.testing.runs.run_search`."""
        budget = budget_for(space, target)
        searcher = self.make(space, budget, [uniform(space, budget)], seed)
        return run_search(searcher, space, more.pop("evaluator", None) or self.landscape(space), folder, **more)

    def check_finalists(self, record: Recording, space: SearchSpace, budget: Budget) -> None:
        """Check that finalists are allocations that keep and fill the budget, measured, different and sorted."""
        finalists = list(record.finalists())
        assert finalists
        assert len(set(finalists)) == len(finalists)
        for allocation in finalists:
            assert all(0 <= level < unit.num_levels for level, unit in zip(allocation, space.units, strict=True))
            assert fits(space, allocation, budget)
            assert denser_moves(space, allocation, budget) == []
        losses = [self.landscape(space).kl(allocation) for allocation in finalists]
        assert losses == sorted(losses)
        outcomes = [outcome for batch in record.told for outcome in batch]
        assert {*finalists} <= {o.request.allocation for o in outcomes if o.request.tokens == self.tokens}

    def test_the_settings_can_be_recorded(self) -> None:
        """A run records the settings, and a resume finds those that it would record again."""
        recorded = SearchSettings().with_custom(self.settings).custom_identity()
        assert json.loads(json.dumps(recorded)) == recorded

    @pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.8, 0.97])
    def test_finalists_keep_and_fill_the_budget_and_are_sorted(
        self, target: float, space: SearchSpace, tmp_path: Path
    ) -> None:
        """Finalists keep and fill the budget, and are sorted."""
        self.check_finalists(self.run(tmp_path, space, target), space, budget_for(space, target))

    @pytest.mark.parametrize("costs", [("macs",), ("params", "macs")])
    @pytest.mark.parametrize("seed", [1, 2])
    def test_finalists_keep_and_fill_other_budgets(
        self, seed: int, costs: Sequence[str], space: SearchSpace, tmp_path: Path
    ) -> None:
        """Budgets may limit any cost, and several."""
        budget = Budget(**{c: (space.cost(space.dense, c) + space.cost(space.sparsest, c)) // 2 for c in costs})
        start = repair(space, space.sparsest, budget, range(len(space.units)))
        record = run_search(self.make(space, budget, [start], seed), space, self.landscape(space), tmp_path)
        best = record.finalists()[0]
        assert fits(space, best, budget)
        assert denser_moves(space, best, budget) == []

    @pytest.mark.parametrize("ladders", ODD_LADDERS.values(), ids=ODD_LADDERS)
    def test_odd_spaces(self, ladders: list[list[int]], tmp_path: Path) -> None:
        """Small spaces and unequal steps are searched too."""
        space = make_space(ladders, fixed=5)
        target = 0.4 * space.sparsity(space.sparsest)
        self.check_finalists(self.run(tmp_path, space, target), space, budget_for(space, target))

    def test_the_search_is_no_worse_than_its_start(self, space: SearchSpace, tmp_path: Path) -> None:
        """The best finalist is at least as good as the start."""
        record = self.run(tmp_path, space, seed=3)
        start = record.batches[0][0].allocation
        assert self.landscape(space).kl(record.finalists()[0]) <= self.landscape(space).kl(start)

    def test_same_seed_same_requests_whatever_else_draws_numbers(self, space: SearchSpace, tmp_path: Path) -> None:
        """Random choices are a function of the seed."""
        np.random.seed(1)  # noqa: NPY002
        first = self.run(tmp_path, space, seed=7)
        np.random.seed(2)  # noqa: NPY002
        second = self.run(tmp_path, space, seed=7)
        assert first.batches == second.batches
        assert first.finalists() == second.finalists()

    def test_seeds_differ(self, space: SearchSpace, tmp_path: Path) -> None:
        """Another seed gives another search."""
        if not self.draws:
            pytest.skip("draws nothing")
        if self.expansions:  # little is left to chance in a small space
            space = make_uneven_space(0, 16, 7)
        assert self.run(tmp_path, space, seed=1).batches != self.run(tmp_path, space, seed=2).batches

    def test_resumed_at_any_point_is_uninterrupted(self, space: SearchSpace, tmp_path: Path) -> None:
        """A search that is told the known outcomes asks for the others, and ends like the uninterrupted one."""
        whole = self.run(tmp_path, space, seed=5)
        measured = whole.known
        for known in {0, 1, 2, len(measured) // 3, len(measured) // 2, len(measured) - 1, len(measured)}:
            evaluator = self.landscape(space)
            resumed = self.run(tmp_path, space, seed=5, evaluator=evaluator, known=measured[:known])
            assert resumed.batches == whole.batches
            assert resumed.finalists() == whole.finalists()
            assert [r.key for r in evaluator.requests] == [o.request.key for o in measured[known:]]

    def test_nothing_is_measured_twice(self, space: SearchSpace, tmp_path: Path) -> None:
        """No measurement is made twice."""
        evaluator = self.landscape(space)
        self.run(tmp_path, space, evaluator=evaluator)
        assert len({r.key for r in evaluator.requests}) == len(evaluator.requests)

    def test_the_end_has_a_reason(self, space: SearchSpace, tmp_path: Path) -> None:
        """The searcher says why it ended, and keeps saying that it has."""
        budget = budget_for(space, 0.5)
        searcher = self.make(space, budget, [uniform(space, budget)], 0)
        run_search(searcher, space, self.landscape(space), tmp_path)
        assert searcher.ended()
        assert list(searcher.ask()) == []

    def test_the_order_in_which_workers_answer_is_irrelevant(self, space: SearchSpace, tmp_path: Path) -> None:
        """Workers may answer in any order."""
        whole = self.run(tmp_path, space, seed=4)
        for seed in range(2):
            other = self.run(tmp_path, space, seed=4, evaluator=Shuffled(self.landscape(space), seed))
            assert other.batches == whole.batches
            assert other.finalists() == whole.finalists()

    def test_what_cannot_be_measured_is_never_the_best(self, space: SearchSpace, tmp_path: Path) -> None:
        """An allocation that cannot be measured is told as bad, and is not the best."""
        evaluator = Failing(self.landscape(space), uniform(space, budget_for(space, 0.5)))
        record = self.run(tmp_path, space, evaluator=evaluator)
        assert evaluator.failed
        assert record.finalists()
        assert record.finalists()[0] not in evaluator.failed
        outcomes: list[Outcome] = [outcome for batch in record.told for outcome in batch]
        assert all(np.isfinite(outcome.loss) for outcome in outcomes)
