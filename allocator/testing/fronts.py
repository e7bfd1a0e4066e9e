"""The contract of search methods that find fronts.

::

    class TestMine(FrontContract):
        settings = MySettings(trials=40, tokens=128)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pytest

from allocator.core.budget import Budget, denser_moves, fits
from allocator.core.front import minimised, pareto_front
from allocator.core.protocols import AllocationEvaluator, Outcome, Request
from allocator.core.space import SearchSpace
from allocator.searchers.methods.sweep import make_budgets
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.testing.landscapes import Chain
from allocator.testing.spaces import make_six_units, make_space

ODD_LADDERS = {
    "one unit": [[100, 80, 60, 40, 20, 0]],
    "two levels": [[100, 50]],
    "one unit that moves": [[50], [40], [90, 60, 30, 0], [10]],
    "no choice": [[50], [40]],
    "unequal costs": [[1000, 1], [3, 2, 1, 0], [77, 11], [500, 499, 3]],
}


class TwoTexts:
    """An evaluator with two losses: one text depends on the even units alone, the other on the odd ones."""

    def __init__(self, space: SearchSpace) -> None:
        """Measure allocations of a space."""
        self._space = space

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield ``kl.even``, ``kl.odd`` and their mean."""
        for request in requests:
            each = [u.sparsity(level) ** 2 for u, level in zip(self._space.units, request.allocation, strict=True)]
            even, odd = sum(each[::2]), sum(each[1::2])
            measured = {"kl.even": even, "kl.odd": odd, "kl": (even + odd) / 2}
            yield Outcome(request=request, measured=measured, wall_s=0.0)


class FrontRecord:
    """A search that runs to its end. Known outcomes answer its requests first, then an evaluator.

    Attributes:
        batches: The requests of every batch.
        told: The outcomes of every batch.
        asked: What the evaluator measured.
        ended: Why the search ended.
    """

    def __init__(
        self,
        settings: MethodSettings,
        problem: SearchProblem,
        evaluator: AllocationEvaluator,
        known: Iterable[Outcome] = (),
    ) -> None:
        """Search."""
        self.batches: list[list[Request]] = []
        self.told: list[list[Outcome]] = []
        self.asked: list[Request] = []
        self._tokens = settings.fidelities[-1]
        answers = {outcome.request.key: outcome for outcome in known}
        searcher = settings.make(problem)
        while requests := searcher.ask():
            new = [request for request in requests if request.key not in answers]
            self.asked += new
            answers |= {outcome.request.key: outcome for outcome in evaluator.evaluate(new)}
            self.batches.append(list(requests))
            self.told.append([answers[request.key] for request in requests])
            searcher.tell(self.told[-1])
        self.ended = searcher.ended()

    @property
    def measured(self) -> list[Outcome]:
        """What was measured at the last fidelity."""
        outcomes = [outcome for batch in self.told for outcome in batch]
        return [o for o in outcomes if o.request.tokens == self._tokens and not o.request.probe]


def follow(
    settings: MethodSettings,
    space: SearchSpace,
    evaluator: AllocationEvaluator,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    objectives: Sequence[str] = ("params",),
    known: Iterable[Outcome] = (),
) -> FrontRecord:
    """Search a front from uniform at three budgets, and return the record.

    Args:
        settings: Of the method.
        space: What may be pruned.
        evaluator: Measures what is not known.
        seed: Of all random choices.
        budget: None for the size of the dense model.
        objectives: Costs in addition to the loss, or measurements in its place.
        known: Outcomes that are known before, as after a resume.
    """
    budget = budget or Budget(params=space.cost(space.dense))
    names = minimised("kl", objectives)
    costs = [name for name in names if name in space.fixed]
    start = [uniform(space, each) for each in (make_budgets(space, budget, costs[:1], 3) if costs else [budget])]
    problem = SearchProblem(space=space, budget=budget, objectives=names, start=start, seed=seed)
    return FrontRecord(settings, problem, evaluator, known)


def find_size(space: SearchSpace, outcome: Outcome, cost: str = "params") -> float:
    """Return the cost of an allocation, from 0 for the sparsest to 1 for the dense model."""
    low, high = space.cost(space.sparsest, cost), space.cost(space.dense, cost)
    return (space.cost(outcome.request.allocation, cost) - low) / (high - low)


class FrontContract:
    """What every search method promises that finds fronts.

    Attributes:
        settings: The settings to test.
        several_losses: Whether it minimises several measurements, not the loss and costs alone.
    """

    settings: MethodSettings
    several_losses: bool = False

    @pytest.fixture
    def space(self) -> SearchSpace:
        """Return six units of unequal ladders."""
        return make_six_units()

    def test_fronts_range_over_sizes_and_keep_the_budget(self, space: SearchSpace) -> None:
        """The front has large and small members, all within the budget."""
        limit = (2 * space.cost(space.dense, "macs") + space.cost(space.sparsest, "macs")) // 3
        budget = Budget(params=space.cost(space.dense), macs=limit)
        measured = follow(self.settings, space, Chain(space), budget=budget).measured
        assert all(fits(space, o.request.allocation, budget) for o in measured)
        front = pareto_front(space, measured, ["kl", "params"])
        assert len(front) >= 4
        sizes = [find_size(space, outcome) for outcome in front]
        assert max(sizes) > 0.5
        assert min(sizes) < 0.35

    @pytest.mark.parametrize("objectives", [("params", "macs"), ("macs",)])
    def test_costs_of_any_number_are_objectives(self, objectives: Sequence[str]) -> None:
        """Any cost may be minimised, and several."""
        space = make_space([[100, 80, 60, 40, 20, 0], [50, 30, 0], [70, 35, 10], [20, 15, 10, 5]])
        measured = follow(self.settings, space, Chain(space), objectives=objectives).measured
        front = pareto_front(space, measured, ["kl", *objectives])
        assert len({space.cost(o.request.allocation) for o in front}) >= 3

    @pytest.mark.parametrize("costs", [(), ("params",)])
    def test_losses_of_several_texts_are_objectives(self, costs: Sequence[str]) -> None:
        """Losses on several texts may be minimised, with costs and without."""
        if not self.several_losses:
            pytest.skip("serves one loss")
        space = make_space([[100, 80, 60, 40, 20, 0]] * 6)
        budget, names = Budget(params=space.limit_for(0.5)), ["kl.even", "kl.odd"]
        measured = follow(self.settings, space, TwoTexts(space), budget=budget, objectives=(*names, *costs)).measured
        front = pareto_front(space, measured, [*names, *costs])
        assert all(fits(space, o.request.allocation, budget) for o in measured)
        if costs:
            assert len({find_size(space, o) for o in front}) >= 3
            return
        assert not any(denser_moves(space, o.request.allocation, budget) for o in measured)
        for name in names:
            assert min(o.measured[name] for o in front) < 0.8 * measured[0].measured[name]

    @pytest.mark.parametrize("ladders", ODD_LADDERS.values(), ids=ODD_LADDERS)
    def test_odd_spaces(self, ladders: list[list[int]]) -> None:
        """Small spaces and unequal steps are searched too."""
        space = make_space(ladders, fixed=5)
        record = follow(self.settings, space, Chain(space))
        assert record.measured
        assert record.ended

    def test_seeds_resuming_and_nothing_twice(self, space: SearchSpace) -> None:
        """A search that is told what is known asks for the rest; nothing is measured twice."""
        whole = follow(self.settings, space, Chain(space), seed=5)
        assert len({request.key for request in whole.asked}) == len(whole.asked)
        measured = list({o.request.key: o for batch in whole.told for o in batch}.values())
        for known in {0, 1, len(measured) // 2, len(measured)}:
            resumed = follow(self.settings, space, Chain(space), seed=5, known=measured[:known])
            assert resumed.batches == whole.batches
            assert [r.key for r in resumed.asked] == [o.request.key for o in measured[known:]]
