"""Rules that measure, each against its own definition on a landscape that is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from allocator.core.budget import budget_for, fits
from allocator.searchers.rules.baselines import two_rate
from allocator.searchers.rules.measured import MEASURED_RULES, RuleTokens, make_rule_searcher

TOKENS = RuleTokens(64, 128)
LADDER = [100, 75, 50, 25, 0]


@pytest.fixture
def wide(make_space):
    return make_space([LADDER, [2 * count for count in LADDER]] * 4, fixed=9)


@pytest.fixture
def answer(run):
    """Runs a rule and returns its record; the one finalist is its answer."""

    def answer(name, space, target, evaluator):
        budget = budget_for(space, target)
        return run(
            lambda *_: make_rule_searcher(MEASURED_RULES[name].run(space, budget, target, TOKENS), (), TOKENS),
            space,
            target,
            evaluator=evaluator,
        )

    return answer


def only(record):
    (allocation,) = record.finalists()
    return allocation


def test_two_rate_is_the_best_of_its_sweep(wide, answer, landscape):
    own = landscape(wide, seed=1)
    assert only(answer("two_rate", wide, 0.4, own)) == min(two_rate(wide, budget_for(wide, 0.4)), key=own.kl)


def test_atp_measures_lines_over_depth_and_takes_the_best(wide, answer, landscape):
    own = landscape(wide, seed=2)
    record = answer("atp", wide, 0.5, own)
    tried = [request.allocation for request in record.batches[0]]
    assert 1 < len(tried) <= 8
    for allocation in tried:
        sparsities = [u.sparsity(level) for u, level in zip(wide.units, allocation, strict=True)]
        blocks = [sum(sparsities[2 * b : 2 * b + 2]) / 2 for b in range(4)]
        assert blocks == sorted(blocks)
    steepest = [wide.units[i].sparsity(level) for i, level in enumerate(tried[-1])]
    np.testing.assert_allclose(steepest, np.repeat([0, 1 / 3, 2 / 3, 1], 2), atol=0.26)
    assert only(record) == min(tried, key=own.kl)


def test_finercut_is_greedy(wide, answer, landscape):
    own, budget = landscape(wide, seed=3, interaction=2.0), budget_for(wide, 0.5)
    expected = wide.dense
    while not fits(wide, expected, budget):
        left = [i for i, level in enumerate(expected) if level == 0]
        expected = min(((*expected[:i], 4, *expected[i + 1 :]) for i in left), key=own.kl)
    found = only(answer("finercut", wide, 0.5, own))
    changed = [i for i in range(8) if found[i] != expected[i]]
    assert len(changed) <= 1  # the last that was dropped takes back what the budget leaves
    assert all(expected[i] == 4 for i in changed)


def test_finercut_scores_what_is_left_again_after_each_removal(wide, answer, landscape):
    record = answer("finercut", wide, 0.5, landscape(wide, seed=3))
    assert [len(batch) for batch in record.batches[:-1]] == list(range(8, 8 - len(record.batches) + 1, -1))
    for batch, told in itertools.pairwise(zip(record.batches[:-1], record.told[:-1], strict=True)):
        best = min(batch[1], key=lambda outcome: outcome.loss).request.allocation
        assert all(sum(a != b for a, b in zip(request.allocation, best, strict=True)) == 1 for request in told[0])


def test_rd_is_the_best_allocation_if_distortions_add_up(make_space, answer, landscape):
    space = make_space([[40, 20, 0], [60, 30, 10], [50, 25, 0], [90, 45, 0]])
    own = landscape(space, seed=4, interaction=0.0)
    within = [a for a in itertools.product(range(3), repeat=4) if fits(space, a, budget_for(space, 0.45))]
    record = answer("rd", space, 0.45, own)
    assert own.kl(only(record)) == pytest.approx(min(map(own.kl, within)))
    assert all(sum(map(bool, request.allocation)) <= 1 for request in record.batches[0])
    assert len(record.batches[0]) == 9


def test_adapt_pruner_follows_its_formula(make_space, answer, landscape):
    """On ladders of single parameters, against the recurrence written out."""
    space = make_space([list(range(4000, -1, -1))] * 6)
    own = landscape(space, seed=5)
    record = answer("adapt_pruner", space, 0.3, own)
    assert [len(batch) for batch in record.batches] == [1] * 7
    assert all(request.probe == "influence" for batch in record.batches[:-1] for request in batch)
    sparsities = np.zeros(3)
    for told, following in itertools.pairwise(record.told):
        influence = np.array([told[0].measured[f"influence.{block}"] for block in range(3)])
        centred = influence - influence.mean()
        sparsities = np.clip(sparsities + 0.05 - 0.03 * centred / np.abs(centred).max(), 0, 1)
        found = [space.units[2 * b].sparsity(following[0].request.allocation[2 * b]) for b in range(3)]
        np.testing.assert_allclose(found, sparsities, atol=1e-3)
    assert space.sparsity(only(record)) == pytest.approx(0.3, abs=1e-3)
    assert len(set(only(record))) > 1


def test_what_is_measured_on_the_way_is_cheap(wide, answer, landscape):
    for name in ("finercut", "rd", "adapt_pruner"):
        record = answer(name, wide, 0.5, landscape(wide))
        assert {request.tokens for batch in record.batches[:-1] for request in batch} == {TOKENS.few}
        assert [request.tokens for request in record.batches[-1]] == [TOKENS.all]
