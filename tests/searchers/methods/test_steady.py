"""Evolution without generations: what it knows depends on its lag, and on nothing else."""

import numpy as np
import pytest

from allocator.core.budget import budget_for, repair
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Request
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.steady import SteadyEvolution, SteadySettings
from allocator.searchers.problem import SearchProblem


class Concurrent:
    """Answers what is under way in any order, as a pool does; an iterator yields what others would."""

    def __init__(self, landscape, seed):
        self._landscape, self._rng = landscape, np.random.default_rng(seed)
        self._open, self.most = {}, 0

    def evaluate(self, requests):
        self._open |= {request.key: request for request in requests}
        self.most = max(self.most, len(self._open))
        return self._outcomes({request.key for request in requests})

    def _outcomes(self, own):
        while own & self._open.keys():
            key = list(self._open)[self._rng.integers(len(self._open))]
            yield from self._landscape.evaluate([self._open.pop(key)])


class Recording(SteadyEvolution):
    """Notes how often it was told before each ask."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.told_before, self.proposed, self.told = [], [], 0

    def ask(self):
        requests = super().ask()
        if requests:
            self.told_before.append(self.told)
            self.proposed.append(list(requests))
        return requests

    def tell(self, outcomes):
        self.told += 1
        super().tell(outcomes)


@pytest.fixture
def go(space, tmp_path):
    def run(evaluator, lag, name="journal", known=(), trials=50, **more):
        budget = budget_for(space, 0.5)
        start = [repair(space, space.sparsest, budget, range(len(space.units)))]
        settings = SteadySettings(trials=trials, lag=lag, tokens=(64, 128), **more)
        problem = SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=3)
        searcher = Recording(problem, settings)
        path = tmp_path / f"{name}.jsonl"
        with Journal.create(path, JournalHeader(space=space)) as journal:
            for outcome in known:
                journal.append(outcome)
            searcher.end = search(searcher, Measurer(evaluator, journal), lag=lag)
            searcher.measured = list(journal)
        return searcher

    return run


@pytest.mark.parametrize("lag", [0, 1, 7, 200])
def test_a_proposal_sees_what_its_lag_lets_through(go, space, landscape, lag):
    evaluator = Concurrent(landscape(space), 0)
    record = go(evaluator, lag)
    assert record.told_before == [max(0, place - lag) for place in range(len(record.proposed))]
    assert record.told == len(record.proposed)
    assert evaluator.most <= lag + 1


@pytest.mark.parametrize("lag", [0, 5, 30])
def test_whoever_is_fast_the_search_is_the_same(go, space, landscape, lag):
    first, *others = (go(Concurrent(landscape(space), seed), lag, f"journal{seed}") for seed in range(4))
    assert len(first.proposed) > 20
    for other in others:
        assert other.proposed == first.proposed
        assert other.finalists() == first.finalists()


def test_lags_are_different_searches(go, space, landscape):
    few, many = (go(Concurrent(landscape(space), 0), lag, f"lag{lag}") for lag in (0, 20))
    assert few.proposed != many.proposed


def test_resumed_at_any_point_it_is_uninterrupted(go, space, landscape):
    whole = go(Concurrent(landscape(space), 1), 6)
    for count in (0, 1, 5, len(whole.measured) // 2, len(whole.measured)):
        evaluator = Concurrent(landscape(space), count)
        resumed = go(evaluator, 6, f"from{count}", whole.measured[:count])
        assert resumed.proposed == whole.proposed
        assert len(evaluator._landscape.requests) == len(whole.measured) - count


def test_one_in_so_many_goes_on_and_it_is_the_best(go, space, landscape):
    """Without lag: a promotion is the best of its set that has not gone on."""
    record = go(Concurrent(landscape(space), 0), 0, reduction=4, trials=80)
    truth, scored, promoted = landscape(space), [], []
    for requests in record.proposed[1:]:
        (request,) = requests
        if request.tokens == 64:
            scored.append(request.allocation)
        else:
            waiting = [a for a in scored if a not in promoted]
            best = min(waiting, key=lambda a: (next(truth.evaluate([Request(a, 64)])).loss, a))
            assert request.allocation == best
            promoted.append(request.allocation)
            assert len(promoted) == len(scored) // 4
    assert len(promoted) >= 3


def test_it_says_why_it_ends(go, space, landscape):
    assert go(Concurrent(landscape(space), 0), 3, trials=10).end == "all 10 proposals are done"
    assert go(Concurrent(landscape(space), 0), 3, "patient", trials=500, patience=9).end.startswith("no better")


@pytest.mark.parametrize(
    "wrong", [{"lag": -1}, {"trials": 0}, {"reduction": 1}, {"tokens": (128, 64)}, {"tokens": ()}, {"patience": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"search\.steady"):
        SteadySettings(**wrong)
