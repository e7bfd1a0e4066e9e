"""From objectives to a front and a decision: the search, its members on text of their own, and which is the plan.

Everything here asks the journal first, so a finished run can be replayed without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from allocator.core.budget import Budget, fits
from allocator.core.front import figure, knee, minimised, pareto_front
from allocator.core.journal import Journal
from allocator.core.protocols import AllocationEvaluator, Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.decide import Decision, SearchSettings
from allocator.searchers.hypervolume import box, is_likelihood
from allocator.searchers.loop import Listener, Measurer, search
from allocator.searchers.methods.bayesian import Bayesian, GpSettings, TpeSettings
from allocator.searchers.methods.emo_pms import emo_pms
from allocator.searchers.methods.nsga import Nsga
from allocator.searchers.methods.sweep import budgets, sweep
from allocator.searchers.rules.baselines import two_rate, uniform
from allocator.searchers.script import Scripted

MEMBERS = 24
"""Members of a front that are measured again on the selection split, at most: evenly spaced ones."""

_STARTS = 3
"""Uniform allocations with which every search of a front begins."""


def make_front_searcher(
    space: SearchSpace,
    budget: Budget,
    names: Sequence[str],
    start: Sequence[Allocation],
    settings: SearchSettings,
    seed: int,
) -> Searcher:
    """Return the searcher that the settings name, beginning at ``start``, allocations within the budget.

    ``names`` are what the front minimises; see :func:`~allocator.core.front.minimised`.
    """
    costs = [name for name in names if name in space.fixed]
    if settings.method == "nsga2" or settings.method == "nsga3":
        return Nsga(settings.method, space, budget, names, start, settings.nsga, seed)
    if settings.method == "emo_pms":
        return Scripted(emo_pms(space, budget, costs, start, settings.emo_pms, seed), list)
    if isinstance(settings.own, TpeSettings | GpSettings):
        return Bayesian(space, budget, names, start, settings.own, seed)
    return sweep(space, budget, costs, start, settings.tokens, settings.sweep, seed)


def decide_front(
    space: SearchSpace,
    budget: Budget,
    objectives: Sequence[str],
    settings: SearchSettings,
    seed: int,
    selection_tokens: int,
    evaluator: AllocationEvaluator,
    journal: Journal,
    at_knee: bool = True,
    listen: Listener = lambda outcomes: None,
    phase: Callable[[str], None] = lambda name: None,
) -> Decision:
    """Search a front, measure its members on the selection split, and choose one.

    Args:
        space: What may be pruned.
        budget: What every member keeps to.
        objectives: What shall be small beside the loss, or in its place.
        settings: The method and its settings.
        seed: Of the search.
        selection_tokens: Tokens of the selection split.
        evaluator: Measures what the journal does not know.
        journal: Answers first, and records.
        at_knee: Whether the plan is the knee of the front, and not its member of least loss.
        listen: Called with the outcomes of every batch of the search.
        phase: Called with the name of each phase.
    """
    tokens, names = settings.fidelities[-1], minimised(journal.loss, objectives)
    costs = [name for name in names if name in space.fixed]
    phase("baselines")
    limits = budgets(space, budget, costs[:1], _STARTS) if costs else [budget]
    starts = list(dict.fromkeys(uniform(space, each) for each in limits))
    beside = [space.dense] if any(map(is_likelihood, names)) else []
    measurer, known = Measurer(evaluator, journal), dict[Allocation, Outcome]()

    def heard(outcomes: Sequence[Outcome]) -> None:
        full = (outcome for outcome in outcomes if outcome.request == Request(outcome.request.allocation, tokens))
        within = (o for o in full if fits(space, o.request.allocation, budget))
        known.update({o.request.allocation: o for o in within if o.request.allocation not in measurer.failed})
        listen(outcomes)

    heard(measurer.measure([Request(allocation, tokens) for allocation in dict.fromkeys([*starts, *beside])]))
    phase("search")
    searcher = make_front_searcher(space, budget, names, starts, settings, seed)
    ended = search(searcher, measurer, heard, settings.limit())
    phase("selection")
    front = pareto_front(space, known.values(), names)
    places = dict.fromkeys(round(place) for place in np.linspace(0, len(front) - 1, min(MEMBERS, len(front))))
    members = [front[place].request.allocation for place in places]
    selected = measurer.measure([Request(allocation, selection_tokens, "selection") for allocation in members])
    again = measurer.sound(selected)
    best = pareto_front(space, again, names)
    figures = np.array([[figure(space, outcome, name) for name in names] for outcome in best])
    lowest = min(range(len(best)), key=lambda place: best[place].loss)
    winner = best[knee(figures, *box(journal, names)) if at_knee else lowest].request.allocation
    own = Budget(**{**budget.limits, **{cost: space.cost(winner, cost) for cost in costs}})
    even, sweep_ = uniform(space, own), two_rate(space, own)
    scored = measurer.measure([Request(allocation, tokens) for allocation in dict.fromkeys([even, *sweep_, winner])])
    measurer.require([even])
    losses = {outcome.request.allocation: outcome.loss for outcome in scored}
    chosen = next(outcome for outcome in again if outcome.request.allocation == winner)
    assert fits(space, winner, budget), "every searcher keeps to the budget"
    return Decision(
        uniform=even,
        two_rate=min(sweep_, key=lambda allocation: (losses[allocation], allocation)),
        searched=winner,
        losses={"search": losses[winner], "selection": chosen.loss},
        ended=ended,
        spent=measurer.spent,
    )
