"""The searches that learn a model, on landscapes whose optima are known."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, denser_moves, fits, repair
from allocator.core.effort import Limit
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.auto import AutoMethod, GuidedMethod, TrustRegionMethod
from allocator.searchers.methods.evolution import EvolutionSettings, ExchangeEvolution
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.solvers.knapsack import knapsack
from allocator.searchers.solvers.space_arrays import SpaceArrays
from allocator.searchers.surrogates.surrogate import Difference
from allocator.searchers.surrogates.tabular import Tabular
from allocator.testing import landscapes

ALL = landscapes.TOKENS * landscapes.SEQUENCES


def _search(landscape, tmp_path, evaluations, seed=0, tokens=(ALL,), method="auto", patience=25):
    space = landscape.space
    budget = budget_for(space, 0.5)
    far = GuidedSettings(patience=patience)
    methods = {
        "auto": AutoMethod(tokens=tokens, guided=far),
        "trust_region": TrustRegionMethod(tokens=tokens),
        "guided": GuidedMethod(tokens=tokens, guided=far),
    }
    start = [uniform(space, budget)]
    problem = SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=seed)
    searcher = methods[method].make(problem)
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        search(searcher, Measurer(landscape, journal), limit=Limit(evaluations, "evaluations"))
    return searcher.finalists()[0], budget


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_is_exact_where_losses_add_up(seed, monotone):
    landscape = landscapes.additive(seed, monotone=monotone)
    budget = budget_for(landscape.space, 0.5)
    found = knapsack(landscape.space, budget, [term.mean(0).tolist() for term in landscape.terms])
    least, _ = landscape.optimum(budget)
    if monotone:
        assert landscape.loss(found) == pytest.approx(least, rel=1e-9)
    else:  # a full budget is worth more than the sum
        assert landscape.loss(found) >= least - 1e-9
    assert not denser_moves(landscape.space, found, budget)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_where_units_interact_the_additive_optimum_is_wrong_and_auto_is_near_the_true_one(seed, tmp_path):
    landscape = landscapes.planted(seed)
    budget = budget_for(landscape.space, 0.5)
    least, _ = landscape.optimum(budget)
    additive = knapsack(landscape.space, budget, [term.mean(0).tolist() for term in landscape.terms])
    assert landscape.loss(additive) > 1.05 * least
    found, _ = _search(landscape, tmp_path, 1000, seed)
    assert landscape.loss(found) <= 1.01 * least


def test_few_tokens_lead_near_the_optimum_on_all(tmp_path):
    landscape = landscapes.additive(1)
    found, budget = _search(landscape, tmp_path, 400, tokens=(ALL // 8, ALL))
    least, _ = landscape.optimum(budget)
    start = landscape.loss(uniform(landscape.space, budget))
    assert landscape.loss(found) - least < 0.15 * (start - least)


@pytest.mark.parametrize("method", ["trust_region", "guided"])
def test_each_part_alone_goes_most_of_the_way(method, tmp_path):
    landscape = landscapes.additive(2, num_units=24)
    found, budget = _search(landscape, tmp_path, 500, method=method)
    least, _ = landscape.optimum(budget)
    start = landscape.loss(uniform(landscape.space, budget))
    assert landscape.loss(found) - least < 0.3 * (start - least)


@given(data=st.data())
def test_settled_allocations_keep_and_fill_the_budget(spaces, data):
    space = data.draw(spaces)
    budget = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    arrays = SpaceArrays(space, budget)
    levels = [data.draw(st.integers(0, unit.num_levels - 1)) for unit in space.units]
    table = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=arrays.price_ul.shape)
    settled = arrays.fit_to_budget(levels, table)
    assert fits(space, settled, budget)
    assert denser_moves(space, settled, budget) == []
    assert arrays.fills_budget(settled)
    assert arrays.fills_budget(tuple(levels)) == (
        fits(space, levels, budget) and not denser_moves(space, levels, budget)
    )


def _differences(landscape, centre, others, tokens):
    count = tokens // landscapes.TOKENS
    for other in others:
        each = landscape.parts(other)[:count] - landscape.parts(centre)[:count]
        size = (landscape.parts(other)[:count].mean() + landscape.parts(centre)[:count].mean()) / 2
        error = each.std(ddof=1) / size / np.sqrt(count) if count > 1 else None
        yield Difference(allocation=other, reference=centre, value=each.mean() / size, tokens=tokens, error=error)


def _steps(space, centre):
    for index, unit in enumerate(space.units):
        for level in (centre[index] - 1, centre[index] + 1):
            if 0 <= level < unit.num_levels:
                yield (*centre[:index], level, *centre[index + 1 :])


def test_the_model_learns_a_profile_and_is_unsure_beyond_it():
    landscape = landscapes.additive(0, num_units=12)
    budget = budget_for(landscape.space, 0.5)
    centre = uniform(landscape.space, budget)
    model = Tabular(SpaceArrays(landscape.space, budget), centre, ALL)
    steps = list(_steps(landscape.space, centre))
    for one in _differences(landscape, centre, steps, ALL):
        model.observe(one)
    model.refresh(centre)
    true = np.array([one.value for one in _differences(landscape, centre, steps, ALL)])
    assert np.corrcoef(model.predict(np.array(steps)), true)[0, 1] > 0.99
    deviation = model.deviation()
    assert np.allclose(deviation[np.arange(12), centre], 0.0, atol=1e-9)
    assert (deviation[:, 8] > deviation[:, 5]).all()


def test_asking_again_on_few_tokens_teaches_nothing_but_all_tokens_do():
    landscape = landscapes.additive(3, num_units=12)
    budget = budget_for(landscape.space, 0.5)
    centre = uniform(landscape.space, budget)
    few, steps = 2 * landscapes.TOKENS, list(_steps(landscape.space, centre))
    spread = []
    for extra in (), [(few, steps)], [(ALL, steps)]:
        model = Tabular(SpaceArrays(landscape.space, budget), centre, ALL)
        for tokens, asked in [(few, steps), *extra]:
            for one in _differences(landscape, centre, asked, tokens):
                model.observe(one)
        model.refresh(centre)
        spread.append(model.deviation()[:, centre[0] + 1].mean())
    assert spread[1] > 0.8 * spread[0]
    assert spread[2] < 0.7 * spread[0]


def test_pairs_that_interact_are_found():
    landscape = landscapes.additive(0, num_units=8)
    weight = 4.0 * max(float(term.mean(0)[4]) for term in landscape.terms)
    landscape = landscapes.Pairwise(landscape.space, landscape.terms, ((1, 6, weight),))
    budget = budget_for(landscape.space, 0.5)
    centre = uniform(landscape.space, budget)
    rng, model = np.random.default_rng(0), Tabular(SpaceArrays(landscape.space, budget), centre, ALL)
    others = [tuple(np.clip(np.array(centre) + rng.integers(-2, 3, 8), 0, 8).tolist()) for _ in range(160)]
    for one in _differences(landscape, centre, [*_steps(landscape.space, centre), *others[:120]], ALL):
        model.observe(one)
    model.refresh(centre)
    true = np.array([one.value for one in _differences(landscape, centre, others[120:], ALL)])
    assert np.corrcoef(model.predict(np.array(others[120:])), true)[0, 1] > 0.95


def test_a_start_over_budget_by_repair_only(space, tmp_path, landscape):
    budget = budget_for(space, 0.5)
    start = [repair(space, space.sparsest, budget, range(len(space.units)))]
    searcher = AutoMethod(tokens=(64, 128)).make(
        SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=0)
    )
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        end = search(searcher, Measurer(landscape(space), journal))
    assert "races" in end or "nothing is left" in end
    assert all(fits(space, a, budget) for a in searcher.finalists())


@pytest.mark.parametrize("method", ["auto", "trust_region", "guided"])
@pytest.mark.parametrize("seed", range(3))
def test_where_expansions_are_told_few_measurements_lead_near_the_optimum(seed, method, tmp_path):
    bowl = landscapes.bowl(seed, num_units=24)
    found, budget = _search(bowl, tmp_path, 120, seed, method=method, patience=4)
    least, start = bowl.optimum(budget)[0], bowl.loss(uniform(bowl.space, budget))
    # a trust region ends when a round gains less than it is told to
    assert bowl.loss(found) - least <= (0.06 if method == "trust_region" else 0.01) * (start - least)
    assert len(bowl.requests) <= 120


@pytest.mark.parametrize("seed", range(2))
def test_auto_comes_nearer_in_an_eighth_of_the_measurements_of_exchange_evolution(seed, tmp_path):
    bowl = landscapes.bowl(seed, num_units=24)
    found, budget = _search(bowl, tmp_path, 120, seed, patience=4)
    settings = EvolutionSettings(generations=100, offspring=16, tokens=(ALL,), survivors=(1,), patience=100)
    problem = SearchProblem(
        space=bowl.space, budget=budget, objectives=("kl",), start=[uniform(bowl.space, budget)], seed=seed
    )
    evolution = ExchangeEvolution(problem, settings)
    with Journal.create(tmp_path / "evolution.jsonl", JournalHeader(space=bowl.space)) as journal:
        search(evolution, Measurer(bowl, journal), limit=Limit(960, "evaluations"))
    least = bowl.optimum(budget)[0]
    assert bowl.loss(found) - least < bowl.loss(evolution.finalists()[0]) - least


@pytest.mark.parametrize("seed", range(3))
def test_where_all_units_interact_auto_is_near_the_best_of_all_allocations(seed, tmp_path):
    bowl = landscapes.bowl(seed, reach=6, num_units=7, num_levels=5)
    found, budget = _search(bowl, tmp_path, 80, seed, patience=8)
    within = [a for a in _every(bowl.space) if fits(bowl.space, a, budget) and not denser_moves(bowl.space, a, budget)]
    losses = sorted(map(bowl.loss, within))
    start = bowl.loss(uniform(bowl.space, budget))
    assert len(within) > 200
    assert bowl.loss(found) - losses[0] <= 0.01 * (start - losses[0])


def _every(space):
    return itertools.product(*(range(unit.num_levels) for unit in space.units))


def test_expansions_and_steps_on_few_tokens_lead_near_the_optimum_on_all(tmp_path):
    bowl = landscapes.bowl(1, num_units=24)
    found, budget = _search(bowl, tmp_path, 200, tokens=(ALL // 8, ALL // 4, ALL), patience=4)
    least, start = bowl.optimum(budget)[0], bowl.loss(uniform(bowl.space, budget))
    assert bowl.loss(found) - least <= 0.01 * (start - least)
    few = [request for request in bowl.requests if request.tokens == ALL // 8]
    # one step of each unit, the centre, and its expansion, for the whole search
    assert len(few) == 24 + 2


@pytest.mark.parametrize("method", ["auto", "trust_region", "guided"])
def test_an_evaluator_without_gradients_is_asked_for_an_expansion_once_and_the_search_goes_on(method, tmp_path):
    bowl = landscapes.bowl(0, num_units=12)
    bowl.gradients = False
    found, budget = _search(bowl, tmp_path, 400, tokens=(ALL // 4, ALL), method=method, patience=4)
    assert [request.probe for request in bowl.requests].count("expansion") == 1
    least, start = bowl.optimum(budget)[0], bowl.loss(uniform(bowl.space, budget))
    assert bowl.loss(found) - least <= 0.1 * (start - least)
