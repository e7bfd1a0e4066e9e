"""The contract of every searcher. A new one is one more line in ``SEARCHERS``."""

from dataclasses import replace

import landscapes
import numpy as np
import pytest

from allocator.core.budget import Budget, budget_for, denser_moves, fits, repair
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.methods.steady import SteadySettings
from allocator.searchers.methods.thompson import ThompsonSettings
from allocator.searchers.methods.trust_region import TrustRegionSettings
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.rules.measured import MEASURED_RULES, RuleTokens, make_rule_searcher
from allocator.searchers.settings import SearchSettings

NEAR = TrustRegionSettings(rounds=3, radius=2)
FAR = GuidedSettings(generations=4, proposals=64, entrants=6, survivors=2)
SEARCHERS = {
    "evolution": SearchSettings(
        method="evolution", evolution=EvolutionSettings(generations=5, offspring=6, tokens=(64, 128), survivors=(2, 1))
    ),
    "evolution, one stage": SearchSettings(
        method="evolution", evolution=EvolutionSettings(generations=5, offspring=6, tokens=(128,), survivors=(1,))
    ),
    "evolution with training": SearchSettings(
        method="evolution",
        evolution=EvolutionSettings(generations=5, offspring=6, tokens=(64, 128), survivors=(2, 1), training=(0, 256)),
    ),
    "evolution within kinds": SearchSettings(
        method="evolution",
        evolution=EvolutionSettings(generations=5, offspring=6, tokens=(64, 128), survivors=(2, 1), within_kind=True),
    ),
    "auto": SearchSettings(method="auto", tokens=(64, 128), trust_region=NEAR, guided=FAR),
    "auto, three fidelities": SearchSettings(method="auto", tokens=(32, 64, 128), trust_region=NEAR, guided=FAR),
    "auto, one fidelity": SearchSettings(method="auto", tokens=(128,), trust_region=NEAR, guided=FAR),
    "trust_region": SearchSettings(method="trust_region", tokens=(64, 128), trust_region=NEAR),
    "guided": SearchSettings(method="guided", tokens=(64, 128), guided=FAR),
    "steady": SearchSettings(method="steady", steady=SteadySettings(trials=60, lag=0, tokens=(64, 128))),
    "tpe": SearchSettings(method="tpe", tpe=TpeSettings(trials=26, batch=4, tokens=128)),
    "gp": SearchSettings(method="gp", gp=GpSettings(trials=18, batch=4, tokens=128)),
    "thompson": SearchSettings(method="thompson", thompson=ThompsonSettings(trials=30, batch=4, tokens=128)),
}

LEARNING = ("auto", "auto, three fidelities", "auto, one fidelity", "trust_region", "guided")
"""These ask for expansions, and are here also told."""

TOLD = ", told expansions"
SEARCHERS |= {name + TOLD: SEARCHERS[name] for name in LEARNING}

RULES = sorted(MEASURED_RULES.keys() - {"two_rate"})
"""The two-rate sweep serves no space of one part alone."""


@pytest.fixture(params=[*SEARCHERS, *RULES])
def name(request):
    return request.param


@pytest.fixture
def make(name):
    return _rule(name) if name in RULES else _searcher(name)


@pytest.fixture
def landscape(name, landscape):
    if not name.endswith(TOLD):
        return landscape
    return lambda space: landscapes.bowl(0, reach=3, space=space, length=16)


def _searcher(name):
    return lambda space, budget, start, seed: SEARCHERS[name].configured.make(
        SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=seed)
    )


def _rule(name):
    tokens = RuleTokens(64, 128)

    def make(space, budget, start, seed):
        target = min(0.99, max(0.01, space.sparsity(uniform(space, budget))))
        return make_rule_searcher(MEASURED_RULES[name].run(space, budget, target, tokens), start, tokens)

    return make


def _check_finalists(record, space, budget, landscape):
    finalists = list(record.finalists())
    assert finalists
    assert len(set(finalists)) == len(finalists)
    for allocation in finalists:
        assert all(0 <= level < unit.num_levels for level, unit in zip(allocation, space.units, strict=True))
        assert fits(space, allocation, budget)
        assert denser_moves(space, allocation, budget) == []
    kls = [landscape.kl(allocation) for allocation in finalists]
    assert kls == sorted(kls)
    measured = {o.request.allocation for batch in record.told for o in batch if o.request.tokens == 128}
    assert set(finalists) <= measured


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.8, 0.97])
def test_finalists_keep_and_fill_the_budget_and_are_sorted(make, run, space, target, landscape):
    _check_finalists(run(make, space, target), space, budget_for(space, target), landscape(space))


@pytest.mark.parametrize("costs", [("macs",), ("params", "macs")])
@pytest.mark.parametrize("seed", [1, 2])
def test_finalists_keep_and_fill_other_budgets(make, space, landscape, tmp_path, seed, costs):
    budget = Budget(**{c: (space.cost(space.dense, c) + space.cost(space.sparsest, c)) // 2 for c in costs})
    searcher = make(space, budget, [repair(space, space.sparsest, budget, range(len(space.units)))], seed)
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        search(searcher, Measurer(landscape(space), journal))
    best = searcher.finalists()[0]
    assert fits(space, best, budget)
    assert denser_moves(space, best, budget) == []


@pytest.mark.parametrize(
    "ladders",
    [
        [[100, 80, 60, 40, 20, 0]],
        [[100, 50]],
        [[50], [40], [90, 60, 30, 0], [10]],
        [[1000, 1], [3, 2, 1, 0], [77, 11], [500, 499, 3]],
        [[7, 0]] * 12,
    ],
    ids=["one unit", "one unit of two levels", "one unit that moves", "unequal costs", "all alike"],
)
def test_odd_spaces(make, run, make_space, landscape, ladders):
    space = make_space(ladders, fixed=5)
    target = 0.4 * space.sparsity(space.sparsest)
    _check_finalists(run(make, space, target), space, budget_for(space, target), landscape(space))


def test_the_search_is_no_worse_than_its_start(make, run, space, landscape):
    record = run(make, space, seed=3)
    start = record.batches[0][0].allocation
    assert landscape(space).kl(record.finalists()[0]) <= landscape(space).kl(start)


def test_same_seed_same_requests_whatever_else_draws_numbers(make, run, space):
    np.random.seed(1)  # noqa: NPY002
    first = run(make, space, seed=7)
    np.random.seed(2)  # noqa: NPY002
    second = run(make, space, seed=7)
    assert first.batches == second.batches
    assert first.finalists() == second.finalists()


@pytest.mark.parametrize("name", sorted(SEARCHERS.keys() - {"trust_region", "trust_region" + TOLD}))  # it draws nothing
def test_seeds_differ(name, make, run, space):
    if name.endswith(TOLD):  # little is left to chance in a small space
        space = landscapes.make_uneven_space(0, 16, 7)
    assert run(make, space, seed=1).batches != run(make, space, seed=2).batches


def test_resumed_at_any_point_is_uninterrupted(make, run, space, landscape):
    whole = run(make, space, seed=5)
    measured = list({o.request.key: o for batch in whole.told for o in batch}.values())
    for known in {0, 1, 2, len(measured) // 3, len(measured) // 2, len(measured) - 1, len(measured)}:
        evaluator = landscape(space)
        resumed = run(make, space, seed=5, evaluator=evaluator, known=measured[:known])
        assert resumed.batches == whole.batches
        assert resumed.finalists() == whole.finalists()
        assert [r.key for r in evaluator.requests] == [o.request.key for o in measured[known:]]


def test_nothing_is_measured_twice(make, run, space, landscape):
    evaluator = landscape(space)
    run(make, space, evaluator=evaluator)
    assert len({r.key for r in evaluator.requests}) == len(evaluator.requests)


class Shuffled:
    """Answers in any order, as workers do."""

    def __init__(self, evaluator, seed):
        self._evaluator, self._rng = evaluator, np.random.default_rng(seed)

    def evaluate(self, requests):
        outcomes = list(self._evaluator.evaluate(requests))
        yield from (outcomes[place] for place in self._rng.permutation(len(outcomes)))


def test_the_order_in_which_workers_answer_is_irrelevant(make, run, space, landscape):
    whole = run(make, space, seed=4)
    for seed in range(2):
        other = run(make, space, seed=4, evaluator=Shuffled(landscape(space), seed))
        assert other.batches == whole.batches
        assert other.finalists() == whole.finalists()


class Failing:
    """Cannot measure one allocation in five."""

    def __init__(self, evaluator, start):
        self._evaluator, self._seen, self.failed = evaluator, {start}, set()

    def evaluate(self, requests):
        for request in requests:
            allocation = request.allocation
            if allocation not in self._seen:
                self._seen.add(allocation)
                if len(self._seen) % 5 == 3:
                    self.failed.add(allocation)
            if allocation in self.failed:
                yield Outcome(request=request, measured={}, wall_s=0.0, failed="3 workers died")
            else:
                yield from self._evaluator.evaluate([request])


@pytest.mark.parametrize("name", SEARCHERS)
def test_what_cannot_be_measured_is_never_the_best(make, run, space, landscape):
    start = uniform(space, budget_for(space, 0.5))
    evaluator = Failing(landscape(space), start)
    record = run(make, space, evaluator=evaluator)
    assert evaluator.failed
    assert record.finalists()
    assert record.finalists()[0] not in evaluator.failed
    assert all(np.isfinite(outcome.loss) for batch in record.told for outcome in batch)


@pytest.mark.parametrize("name", [name + TOLD for name in LEARNING])
def test_a_journal_cut_anywhere_is_continued(name, make, space, landscape, tmp_path):
    budget = budget_for(space, 0.5)
    start = [repair(space, space.sparsest, budget, range(len(space.units)))]

    def go(path, evaluator):
        journal = Journal.resume(path) if path.exists() else Journal.create(path, JournalHeader(space=space))
        with journal:
            searcher = make(space, budget, start, 0)
            search(searcher, Measurer(evaluator, journal))
        return searcher.finalists(), path.read_bytes()

    finalists, whole = go(tmp_path / "whole.jsonl", landscape(space))
    assert b'"expansion"' in whole
    lines = whole.splitlines(keepends=True)
    for kept in (1, 2, 3, 4, len(lines) // 2, len(lines) - 1, len(lines)):
        path, evaluator = tmp_path / f"{kept}.jsonl", landscape(space)
        # a crash tears the next line
        path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:40] if kept < len(lines) else b""))
        assert go(path, evaluator) == (finalists, whole)
        assert len(evaluator.requests) == len(lines) - kept


@pytest.mark.parametrize("name", [each for name in LEARNING for each in (name, name + TOLD)])
@pytest.mark.parametrize("ladders", [[[50], [40], [30]], [[50, 20], [40, 0]]], ids=["no choice", "a dense budget"])
def test_where_one_allocation_alone_fills_the_budget_it_is_found(name, ladders, make, make_space, landscape):
    space = make_space(ladders)
    evaluator = landscape(space)
    if name.endswith(TOLD):  # as the divergence of the dense model from itself
        evaluator = replace(evaluator, lowest=np.zeros_like(evaluator.lowest))
        assert evaluator.loss(space.dense) == 0.0
    searcher = make(space, Budget(params=space.cost(space.dense)), [space.dense], 0)
    while requests := searcher.ask():
        searcher.tell(list(evaluator.evaluate(requests)))
    assert list(searcher.finalists()) == [space.dense]
    assert searcher.ended()


@pytest.mark.parametrize("name", [name + TOLD for name in LEARNING])
def test_expansions_are_asked_of_what_was_measured_and_once(name, make, run, space):
    record = run(make, space)
    requests = [request for batch in record.batches for request in batch]
    expanded = [request for request in requests if request.probe]
    assert expanded
    assert len({request.key for request in expanded}) == len(expanded)
    plain = {request.key for request in requests if not request.probe}
    assert all(replace(request, probe="").key in plain for request in expanded)
