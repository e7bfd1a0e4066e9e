import itertools

import numpy as np
import pytest

from allocator.core.budget import budget_for, repair
from allocator.searchers.methods.thompson import Thompson, ThompsonSettings
from allocator.searchers.problem import SearchProblem
from allocator.searchers.solvers.knapsack import knapsack

LADDERS = [[1000, 750, 500, 250, 0], [800, 700, 600, 500, 400, 300, 200, 100, 0]] * 12


def _maker(**settings):
    return lambda space, budget, start, seed: Thompson(
        SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=seed),
        ThompsonSettings(**settings),
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_it_comes_near_the_optimum_of_an_additive_landscape_where_random_search_does_not(
    run, make_space, landscape, seed
):
    space, budget = make_space(LADDERS), budget_for(make_space(LADDERS), 0.5)
    additive = landscape(space, seed=seed, interaction=0.0)
    record = run(_maker(trials=160, tokens=64), space, seed=seed, evaluator=additive)
    evaluations = len({r.key for r in additive.requests})
    assert evaluations <= 160
    rng = np.random.default_rng(seed)
    rivals = [rng.integers([u.num_levels for u in space.units]).tolist() for _ in range(evaluations)]
    by_chance = min(additive.kl(repair(space, r, budget, rng.permutation(24).tolist())) for r in rivals)
    optimum = additive.kl(knapsack(space, budget, additive.terms))
    assert additive.kl(record.finalists()[0]) < optimum + 0.25 * (by_chance - optimum)


def test_killed_after_any_batch_it_goes_on_as_if_it_had_not_been(run, space):
    whole = run(_maker(trials=40, batch=4, tokens=64), space, seed=4)
    assert len(whole.told) > 4
    for done in range(len(whole.told)):
        searcher = _maker(trials=40, batch=4, tokens=64)(
            space, budget_for(space, 0.5), [whole.batches[0][0].allocation], 4
        )
        for batch, told in zip(whole.batches[:done], whole.told[:done], strict=True):
            assert searcher.ask() == batch
            searcher.tell(told)
        assert searcher.ask() == whole.batches[done]


def test_no_allocation_is_proposed_twice(run, make_space):
    record = run(_maker(trials=60, patience=20, tokens=64), make_space(LADDERS[:8]))
    proposed = [r.allocation for batch in record.batches for r in batch]
    assert len(set(proposed)) == len(proposed) > 20


@pytest.mark.parametrize("radius", [1, 3])
def test_proposals_stay_within_the_trust_region(run, make_space, radius):
    """Of equal steps, so that no fill leaves it, and with so many units that there is always something new."""
    space = make_space([[80, 70, 60, 50, 40, 30, 20, 10, 0]] * 30)
    record = run(_maker(trials=80, tokens=64, radius=radius), space)
    known = []
    for told, batch in itertools.pairwise([*record.told, []]):
        known += told
        best = min(known, key=lambda o: (o.loss, o.request.allocation)).request.allocation
        moves = [abs(a - b) for o in batch for a, b in zip(o.request.allocation, best, strict=True)]
        assert max(moves, default=radius) == radius


def test_it_ends_when_trials_are_done(run, make_space):
    record = run(_maker(trials=21, batch=8, tokens=64), make_space(LADDERS))
    assert [len(batch) for batch in record.batches] == [1, 8, 8, 4]
    assert record.ended() == "all 21 trials are done"


def test_it_ends_when_nothing_improves(run, make_space):
    record = run(_maker(trials=2000, patience=3, tokens=64), make_space(LADDERS[:12]))
    best = list(itertools.accumulate((min(o.loss for o in batch) for batch in record.told), min))
    assert record.ended() == "no better allocation for 3 batches"
    assert [a == b for a, b in itertools.pairwise(best)][-3:] == [True] * 3


def test_it_ends_when_draws_agree_on_what_is_known(run, make_space):
    record = run(_maker(trials=50, tokens=64), make_space([[10, 0], [10, 0]]))
    assert set(record.finalists()) == {(0, 1), (1, 0)}
    assert "draws agree" in record.ended()
