import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, denser_moves, fits, repair
from allocator.core.errors import UserError
from allocator.core.protocols import Outcome
from allocator.searchers.methods.evolution import EvolutionSettings, ExchangeEvolution, exchange, move_run
from allocator.searchers.problem import SearchProblem


def _maker(**settings):
    settings = EvolutionSettings(**settings)
    return lambda space, budget, start, seed: ExchangeEvolution(
        SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=seed), settings
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_optimum_of_a_small_additive_landscape_is_found(run, space, landscape, seed, target):
    additive = landscape(space, seed=seed, interaction=0.0)
    budget = budget_for(space, target)
    every = itertools.product(*(range(unit.num_levels) for unit in space.units))
    best = min((a for a in every if fits(space, a, budget)), key=additive.kl)
    make = _maker(generations=60, offspring=16, tokens=(64, 128), survivors=(4, 1))
    record = run(make, space, target, seed=seed, evaluator=additive)
    assert additive.kl(record.finalists()[0]) == pytest.approx(additive.kl(best), abs=1e-12)


def test_the_parent_never_gets_worse(run, make_space):
    space = make_space([[100, 70, 35, 20, 0], [90, 60, 30, 0]] * 5)
    record = run(_maker(generations=12, patience=12, offspring=8, tokens=(64, 128), survivors=(3, 1)), space)
    best = [min(o.loss for o in batch) for batch in record.told if batch[0].request.tokens == 128]
    assert len(best) == 13
    assert best == sorted(best, reverse=True)


def test_the_parent_competes_in_every_last_stage(run, space):
    record = run(_maker(generations=6, offspring=8, tokens=(64, 128), survivors=(3, 1)), space)
    last = [batch for batch in record.told if batch[0].request.tokens == 128]
    for before, after in itertools.pairwise(last):
        parent = min(before, key=lambda o: (o.loss, o.request.allocation)).request
        assert parent in [o.request for o in after]


def test_stages_are_as_the_settings_say(run, make_space):
    space = make_space([[100, 80, 60, 40, 20, 0]] * 10)
    settings = {"generations": 4, "offspring": 8, "tokens": (16, 32, 64), "survivors": (4, 2, 1)}
    record = run(_maker(**settings), space)
    sizes = [(len(batch), {r.tokens for r in batch}) for batch in record.batches]
    assert sizes == [(1, {64}), *[(8, {16}), (4, {32}), (3, {64})] * 4]
    for told, asked in itertools.pairwise(zip(record.told, record.batches, strict=True)):
        outcomes, stage = told[0], asked[1][0].tokens
        if stage == 16:
            continue
        ranked = sorted(outcomes, key=lambda o: (o.loss, o.request.allocation))
        kept = [o.request.allocation for o in ranked[: {32: 4, 64: 2}[stage]]]
        assert [r.allocation for r in asked[1]][: len(kept)] == kept


def test_each_stage_asks_for_its_training(run, space):
    """The parent competes under the training of the last stage, from the start on."""
    settings = {"generations": 4, "offspring": 8, "tokens": (16, 32, 64), "survivors": (4, 2, 1)}
    record = run(_maker(**settings, training=(0, 128, 128)), space)
    asked = [{(r.tokens, r.training) for r in batch} for batch in record.batches]
    assert asked == [{(64, 128)}, *[{(16, 0)}, {(32, 128)}, {(64, 128)}] * 4]
    plain = run(_maker(**settings), space)
    assert {r.training for batch in plain.batches for r in batch} == {0}


class Recovering:
    """What is worst at once is best after training."""

    def __init__(self, space):
        self.kl = lambda allocation: sum(unit.sparsity(a) ** 2 for unit, a in zip(space.units, allocation, strict=True))

    def evaluate(self, requests):
        for request in requests:
            kl = self.kl(request.allocation)
            yield Outcome(
                request=request,
                measured={"kl": 9.0 - kl, "kl_before": kl} if request.training else {"kl": kl},
                wall_s=0.0,
            )


def test_what_recovers_survives(run, make_space):
    space = make_space([[100, 75, 50, 25, 0]] * 6)
    settings = {"generations": 20, "offspring": 8, "tokens": (64,), "survivors": (1,)}
    landscape = Recovering(space)
    plain = run(_maker(**settings), space, evaluator=landscape).finalists()[0]
    trained = run(_maker(**settings, training=(256,)), space, evaluator=landscape).finalists()[0]
    assert landscape.kl(plain) == pytest.approx(6 * 0.25)
    assert landscape.kl(trained) == pytest.approx(3.0)


def test_no_allocation_is_proposed_twice(run, space):
    record = run(_maker(generations=20, offspring=8, tokens=(64, 128), survivors=(3, 1)), space)
    proposed = [r.allocation for batch in record.batches if batch[0].tokens == 64 for r in batch]
    assert len(set(proposed)) == len(proposed)
    assert record.batches[0][0].allocation not in proposed


def test_the_search_ends_when_nothing_new_is_left(run, make_space):
    space = make_space([[10, 0], [10, 0]])
    record = run(_maker(generations=50, offspring=4, tokens=(64, 128), survivors=(2, 1)), space)
    assert len(record.batches) < 10
    assert set(record.finalists()) == {(0, 1), (1, 0)}


def test_it_begins_at_the_best_of_its_starts(run, space, landscape):
    budget = budget_for(space, 0.5)
    units = range(len(space.units))
    starts = [repair(space, space.dense, budget, order) for order in (units, units[::-1])]
    record = run(_maker(generations=1, offspring=4, tokens=(128,), survivors=(1,)), space, start=[*starts, starts[0]])
    assert [r.allocation for r in record.batches[0]] == list(dict.fromkeys(starts))
    assert min(starts, key=landscape(space).kl) in [r.allocation for r in record.batches[1]]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_blocks_goes_whole_and_comes_back_whole(make_space, seed):
    space = make_space([[80, 60, 40, 20, 0], [60, 40, 20, 0]] * 6)
    rng, budget = np.random.default_rng(seed), budget_for(space, 0.5)

    def removed(allocation):
        return [block for block in range(6) if allocation[2 * block : 2 * block + 2] == (4, 3)]

    even = repair(space, [2] * 12, budget, range(12))
    child = move_run(space, even, budget, rng)
    gone = removed(child)
    assert gone == list(range(gone[0], gone[0] + len(gone)))
    assert 1 <= len(gone) <= 3
    halved = repair(space, [0, 0] * 3 + [4, 3] * 3, budget, range(12))
    again = move_run(space, halved, budget, rng)
    assert removed(again) != removed(halved)
    for allocation in (child, again):
        assert fits(space, allocation, budget)
        assert not denser_moves(space, allocation, budget)


def test_blocks_that_only_help_when_they_go_together_are_found(run, make_space):
    """Every block but a run of three is needed, and to remove a part of the run alone is worse than nothing."""
    space = make_space([[100, 50, 0], [100, 50, 0]] * 8)
    sparsest = {2, 3, 4}

    class Landscape:
        def kl(self, allocation):
            whole = [b for b in range(8) if allocation[2 * b : 2 * b + 2] == (2, 2)]
            rest = sum(level for b in range(8) if b not in sparsest for level in allocation[2 * b : 2 * b + 2])
            return 0.1 * rest + (0.0 if sparsest <= set(whole) else 3.0 + sum(allocation[4:10]))

        def evaluate(self, requests):
            for request in requests:
                yield Outcome(request=request, measured={"kl": self.kl(request.allocation)}, wall_s=0.0)

    landscape = Landscape()
    make = _maker(generations=150, offspring=16, patience=150, tokens=(64,), survivors=(1,))
    record = run(make, space, 3 / 8, evaluator=landscape)
    assert landscape.kl(record.finalists()[0]) == 0.0


@given(data=st.data(), seed=st.integers(0, 99), times=st.integers(1, 4))
def test_exchanges_keep_and_fill_the_budget(spaces, data, seed, times):
    space = data.draw(spaces)
    budget = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    parent = repair(space, space.dense, budget, range(len(space.units)))
    child = exchange(space, parent, budget, np.random.default_rng(seed), times)
    assert fits(space, child, budget)
    assert denser_moves(space, child, budget) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generations": 0}, "must be at least 1"),
        ({"offspring": 0}, "must be at least 1"),
        ({"max_exchanges": 0}, "must be at least 1"),
        ({"tokens": (64, 128), "survivors": (1,)}, "one number of survivors for each stage"),
        ({"tokens": (), "survivors": ()}, "one number of survivors for each stage"),
        ({"tokens": (128, 64)}, "expected increasing counts"),
        ({"tokens": (64, 64)}, "expected increasing counts"),
        ({"tokens": (0, 64)}, "expected increasing counts"),
        ({"survivors": (4, 2)}, "expected counts that fall from offspring"),
        ({"survivors": (17, 1)}, "expected counts that fall from offspring"),
        ({"survivors": (0, 1)}, "expected counts that fall from offspring"),
        ({"training": (512,)}, "training: expected a count of tokens for each of the 2 stages"),
        ({"training": (512, 256)}, "training: expected counts that never fall"),
        ({"training": (-512, 256)}, "training: expected counts that never fall"),
        ({"training": (0, 0)}, "training: the last stage trains on no tokens"),
        (
            {"tokens": (16, 32, 64), "survivors": (2, 4, 1)},
            "expected counts that fall from offspring",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=f"search.evolution.*{message}"):
        EvolutionSettings(**settings)


def test_the_search_ends_when_nothing_improves(run, make_space):
    space = make_space([[100, 80, 60, 40, 20, 0]] * 10)
    record = run(_maker(generations=50, patience=3, offspring=4, tokens=(64,), survivors=(1,)), space)
    best = list(itertools.accumulate((min(o.loss for o in batch) for batch in record.told), min))
    assert len(best) < 51
    stale = [a == b for a, b in itertools.pairwise(best)]
    assert stale[-3:] == [True] * 3
    assert not any(all(stale[i : i + 3]) for i in range(len(stale) - 3))
