"""A study: it measures baselines, searches, and chooses the plan among the best on text that the search did not see.

Every measurement is looked up in the journal first, so a finished study can be replayed without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from allocator.core.budget import Budget, denser_moves, fits
from allocator.core.effort import Effort
from allocator.core.front import figure, knee, minimised, pareto_front
from allocator.core.journal import Journal
from allocator.core.protocols import AllocationEvaluator, Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.coarse_to_fine import Round
from allocator.searchers.hypervolume import box, is_likelihood
from allocator.searchers.loop import Listener, Measurer, say_spent, search
from allocator.searchers.methods.sweep import make_budgets
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import two_rate, uniform
from allocator.searchers.settings import SearchSettings

FINALISTS = 4
"""Number of the best allocations that are measured again, on the selection split. The best there is the plan."""

CONFIRMED = 2
"""Maximum number of allocations that are measured on all tokens after a search whose budget was spent."""

MEMBERS = 24
"""Maximum number of members of a front that are measured again, on the selection split. They are evenly spaced."""

_STARTS = 3
"""Uniform allocations with which every search of a front begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is to be decided, and how.

    Attributes:
        space: What may be pruned.
        budget: Limits that every allocation keeps.
        objectives: What is minimised in addition to the loss, or in its place. Empty for a study of one budget. With
            objectives, the study is of a front.
        settings: The method and its settings.
        seed: The seed of the search.
        selection_tokens: Tokens of the selection split on which the best allocations are compared.
        at_knee: Whether the plan is the knee of the front. If not, it is the member with the lowest loss.
        round: What the round before handed to this one. None in the first round.
    """

    space: SearchSpace
    budget: Budget
    objectives: Sequence[str] = ()
    settings: SearchSettings
    seed: int
    selection_tokens: int
    at_knee: bool = True
    round: Round | None = None

    @property
    def round_number(self) -> int:
        """Which round of the search this is; the first is 1."""
        return 1 if self.round is None else self.round.number

    @property
    def is_last_round(self) -> bool:
        """Whether no other round follows."""
        return self.settings.is_last_round(self.round_number)

    @property
    def round_settings(self) -> SearchSettings:
        """The settings of this round."""
        return self.settings.settings_for_round(self.round_number)

    @property
    def tokens(self) -> int:
        """Tokens of the search split on which allocations are compared."""
        return self.round_settings.fidelities[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The chosen allocation, and the baselines within the same budget.

    Attributes:
        uniform: The allocation with one sparsity for all units.
        two_rate: The best allocation with one sparsity for attention and one for all other units.
        searched: The chosen allocation.
        losses: Losses of the chosen allocation: ``search`` on the search split and, in the last round, ``selection`` on
            the selection split. ``incumbent`` is the loss, on the selection split, of the allocation that the round
            before chose.
        ended: Why the search ended.
        spent: The effort of all measurements, those on the selection split included.
    """

    uniform: Allocation
    two_rate: Allocation
    searched: Allocation
    losses: Mapping[str, float]
    ended: str
    spent: Effort


def run_study(
    study: Study,
    evaluator: AllocationEvaluator,
    journal: Journal,
    listen: Listener = lambda outcomes: None,
    phase: Callable[[str], None] = lambda name: None,
) -> Decision:
    """Measure the baselines, search from them, measure the best on the selection split, and choose one.

    Args:
        study: What is to be decided.
        evaluator: Measures what the journal does not hold.
        journal: Is looked up first, and records.
        listen: Called with the outcomes of every batch of the search.
        phase: Called with the name of each phase.
    """
    names = minimised(journal.loss, study.objectives)
    measurer = Measurer(evaluator, journal)
    task: _Task = _FrontTask(study, measurer, names) if study.objectives else _BudgetTask(study, measurer)

    def note(outcomes: Sequence[Outcome]) -> None:
        task.note(outcomes)
        listen(outcomes)

    phase("baselines")
    note(task.measure_baselines())
    phase("search")
    settings = study.round_settings
    searcher = settings.configured.make(
        SearchProblem(
            space=study.space,
            budget=study.budget,
            objectives=tuple(names),
            start=task.find_starts(),
            seed=study.seed,
            is_last_round=study.is_last_round,
        )
    )
    limit = settings.limit(() if study.round is None else study.round.earlier)
    ended = search(searcher, measurer, note, limit, settings.lag)
    if limit is not None and ended == say_spent(limit):
        note(task.confirm(searcher))
    losses: dict[str, float] = {}
    if study.is_last_round:
        phase("selection")
        requests = [
            Request(allocation=allocation, tokens=study.selection_tokens, split="selection", training=settings.training)
            for allocation in task.find_candidates(searcher)
        ]
        selected = measurer.measure(requests)
        chosen = task.choose(measurer.drop_failed(selected), journal)
        winner = chosen.request.allocation
        losses = {"selection": chosen.loss, **({"incumbent": selected[0].loss} if study.round else {})}
    else:
        winner = task.rank(searcher)[0]
    assert fits(study.space, winner, study.budget), "every searcher keeps the budget"
    even, uneven, searched = task.measure_winner(winner)
    return Decision(
        uniform=even,
        two_rate=uneven,
        searched=winner,
        losses={"search": searched, **losses},
        ended=ended,
        spent=measurer.spent,
    )


class _Task(Protocol):
    """The steps in which studies of one budget and studies of a front differ."""

    def measure_baselines(self) -> list[Outcome]:
        """Measure the allocations that are known without a search."""
        ...

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Take note of the outcomes of a batch."""
        ...

    def find_starts(self) -> Sequence[Allocation]:
        """Return the allocations with which the search begins."""
        ...

    def confirm(self, searcher: Searcher) -> list[Outcome]:
        """Measure, on all tokens, the best of what a search that was cut short knows on fewer tokens alone."""
        ...

    def rank(self, searcher: Searcher) -> Sequence[Allocation]:
        """Return the best allocations within the budget that were measured on all tokens, best first."""
        ...

    def find_candidates(self, searcher: Searcher) -> Sequence[Allocation]:
        """Return the allocations that are measured on the selection split."""
        ...

    def choose(self, selected: Sequence[Outcome], journal: Journal) -> Outcome:
        """Return the best of what was measured on the selection split."""
        ...

    def measure_winner(self, winner: Allocation) -> tuple[Allocation, Allocation, float]:
        """Return the uniform and the best two-rate allocation to compare with, and the winner's loss."""
        ...


class _BudgetTask:
    """Steps of a study of one budget.

    If the search trains candidates, finalists are trained too, as in the last stage of the search. Baselines are not
    trained.

    Every round but the first begins at the allocation that the round before chose. This allocation is also a finalist.
    Every round but the last only finds where finer ladders belong, so it chooses the best allocation of its search.
    """

    def __init__(self, study: Study, measurer: Measurer) -> None:
        self._study, self._measurer = study, measurer
        previous = study.round
        self._uniform = uniform(study.space, study.budget) if previous is None else previous.uniform
        self._sweep = two_rate(study.space, study.budget) if previous is None else [previous.two_rate]
        self._incumbents = [] if previous is None else [previous.incumbent]
        self._losses: dict[int, dict[Allocation, float]] = {}
        self._confirmed: list[Allocation] = []

    def measure_baselines(self) -> list[Outcome]:
        """Measure uniform, the two-rate sweep and, in a later round, the incumbent."""
        allocations = dict.fromkeys([self._uniform, *self._sweep, *self._incumbents])
        outcomes = self._measurer.measure(
            [Request(allocation=allocation, tokens=self._study.tokens) for allocation in allocations]
        )
        self._measurer.require_measured([self._uniform, *self._incumbents])
        swept = [outcome for outcome in outcomes if outcome.request.allocation in set(self._sweep)]
        self._two_rate = _find_best(swept).request.allocation
        return outcomes

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Remember losses on the search split, by tokens."""
        for outcome in outcomes:
            request = outcome.request
            if request == Request(allocation=request.allocation, tokens=request.tokens):
                self._losses.setdefault(request.tokens, {})[request.allocation] = outcome.loss

    def confirm(self, searcher: Searcher) -> list[Outcome]:
        """Measure, on all tokens, allocations that are better than the best finalist on the same fewer tokens.

        The budget of the search may end between a race and its last fidelity. Without this step, the best that the race
        found would be lost. Searches that train candidates are left as they are.
        """
        study = self._study
        if study.round_settings.training:
            return []
        full, best = self._losses[study.tokens], searcher.finalists()[0]
        better: dict[Allocation, None] = {}
        for tokens in sorted(self._losses.keys() - {study.tokens}, reverse=True):
            losses = self._losses[tokens]
            ranked = sorted(losses, key=lambda allocation: (losses[allocation], allocation))
            better.update(dict.fromkeys(one for one in ranked if losses[one] < losses.get(best, 0.0)))
        unconfirmed = [one for one in better if one not in full and one not in self._measurer.failed]
        self._confirmed = [one for one in unconfirmed if self._fills_budget(one)][:CONFIRMED]
        return self._measurer.measure([Request(allocation=one, tokens=study.tokens) for one in self._confirmed])

    def rank(self, searcher: Searcher) -> Sequence[Allocation]:
        """Return the searcher's finalists, with what was confirmed after its end."""
        if not self._confirmed:
            return searcher.finalists()
        losses = self._losses[self._study.tokens]
        return sorted({*searcher.finalists(), *self._confirmed}, key=lambda one: (losses[one], one))

    def _fills_budget(self, allocation: Allocation) -> bool:
        space, budget = self._study.space, self._study.budget
        return fits(space, allocation, budget) and not denser_moves(space, allocation, budget)

    def find_starts(self) -> Sequence[Allocation]:
        """Return the incumbent or, in the first round, the baselines."""
        if self._study.settings.starts_uniform:
            return self._incumbents or [self._uniform]
        return self._incumbents or list(dict.fromkeys([self._uniform, self._two_rate]))

    def find_candidates(self, searcher: Searcher) -> Sequence[Allocation]:
        """Return the incumbent, if any, and the best finalists that could be measured."""
        finalists = [allocation for allocation in self.rank(searcher) if allocation not in self._measurer.failed]
        return list(dict.fromkeys([*self._incumbents, *finalists[:FINALISTS]]))

    def choose(self, selected: Sequence[Outcome], journal: Journal) -> Outcome:
        """Return the outcome of least loss."""
        return _find_best(selected)

    def measure_winner(self, winner: Allocation) -> tuple[Allocation, Allocation, float]:
        """Measure the winner on the search split, trained as in the search."""
        study = self._study
        request = Request(allocation=winner, tokens=study.tokens, training=study.round_settings.training)
        loss = self._measurer.measure([request])[0].loss
        assert not denser_moves(study.space, winner, study.budget), "every searcher fills the budget"
        return self._uniform, self._two_rate, loss


class _FrontTask:
    """Steps of a study of a front. Its baselines cost no more than the chosen member."""

    def __init__(self, study: Study, measurer: Measurer, names: Sequence[str]) -> None:
        self._study, self._measurer, self._names = study, measurer, names
        self._costs = [name for name in names if name in study.space.fixed]
        self._starts: list[Allocation] = []
        self._known: dict[Allocation, Outcome] = {}

    def measure_baselines(self) -> list[Outcome]:
        """Measure uniform allocations of several budgets and, where a likelihood is minimised, the dense model."""
        space, budget = self._study.space, self._study.budget
        budgets = make_budgets(space, budget, self._costs[:1], _STARTS) if self._costs else [budget]
        self._starts = list(dict.fromkeys(uniform(space, each) for each in budgets))
        dense = [space.dense] if any(map(is_likelihood, self._names)) else []
        allocations = dict.fromkeys([*self._starts, *dense])
        return self._measurer.measure(
            [Request(allocation=allocation, tokens=self._study.tokens) for allocation in allocations]
        )

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Remember the outcomes on all tokens that are within the budget."""
        for outcome in outcomes:
            allocation = outcome.request.allocation
            if (
                outcome.request == Request(allocation=allocation, tokens=self._study.tokens)
                and fits(self._study.space, allocation, self._study.budget)
                and allocation not in self._measurer.failed
            ):
                self._known[allocation] = outcome

    def find_starts(self) -> Sequence[Allocation]:
        """Return the uniform allocations."""
        return self._starts

    def confirm(self, searcher: Searcher) -> list[Outcome]:
        """Measure nothing: the front holds only what was measured on all tokens."""
        return []

    def rank(self, searcher: Searcher) -> Sequence[Allocation]:
        """Return the searcher's finalists."""
        return searcher.finalists()

    def find_candidates(self, searcher: Searcher) -> Sequence[Allocation]:
        """Return members of the front of all outcomes, evenly spaced."""
        front = pareto_front(self._study.space, self._known.values(), self._names)
        members = dict.fromkeys(round(m) for m in np.linspace(0, len(front) - 1, min(MEMBERS, len(front))))
        return [front[member].request.allocation for member in members]

    def choose(self, selected: Sequence[Outcome], journal: Journal) -> Outcome:
        """Return the knee of the front on the selection split, or its member of least loss."""
        front = pareto_front(self._study.space, selected, self._names)
        if not self._study.at_knee:
            return min(front, key=lambda outcome: outcome.loss)
        figures = [[figure(self._study.space, outcome, name) for name in self._names] for outcome in front]
        return front[knee(np.array(figures), *box(journal, self._names))]

    def measure_winner(self, winner: Allocation) -> tuple[Allocation, Allocation, float]:
        """Measure the winner and the baselines that cost no more, on the search split."""
        space, limits = self._study.space, self._study.budget.limits
        budget = Budget(**{**limits, **{cost: space.cost(winner, cost) for cost in self._costs}})
        even, sweep = uniform(space, budget), two_rate(space, budget)
        allocations = dict.fromkeys([even, *sweep, winner])
        outcomes = self._measurer.measure(
            [Request(allocation=allocation, tokens=self._study.tokens) for allocation in allocations]
        )
        self._measurer.require_measured([even])
        losses = {outcome.request.allocation: outcome.loss for outcome in outcomes}
        return even, min(sweep, key=lambda allocation: (losses[allocation], allocation)), losses[winner]


def _find_best(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=lambda outcome: (outcome.loss, outcome.request.allocation))
