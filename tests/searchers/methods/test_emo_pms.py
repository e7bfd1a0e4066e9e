"""What EMO-PMS promises beyond the contract of all fronts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, fits
from allocator.core.effort import candidate_tokens
from allocator.core.front import pareto_front
from allocator.core.protocols import FEATURES, Outcome, Request
from allocator.searchers.methods.emo_pms import (
    EmoPmsSettings,
    _find_nearest,
    _find_place,
    _Group,
    _make_groups,
    _merge,
    emo_pms,
)
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform

SETTINGS = EmoPmsSettings(groups=4, rounds=2, generations=3, population=8, schemes=6, profile=64, tokens=128)


@pytest.fixture
def deep(make_space):
    """Eight blocks of one unit each, alike but for their order."""
    return make_space([[90, 60, 40, 20, 0]] * 8, parts=("mlp",))


def _batches(space, evaluator, settings=SETTINGS, objectives=("params",)):
    """Return requests and outcomes of a whole search, batch by batch."""
    start = [uniform(space, Budget(params=space.limit_for(share))) for share in (0.25, 0.5, 0.75)]
    whole = Budget(params=space.cost(space.dense))
    problem = SearchProblem(space=space, budget=whole, objectives=["kl", *objectives], start=start)
    script = emo_pms(problem, settings, {})
    asked, batches = next(script), []
    while True:
        batches.append(list(evaluator.evaluate(asked)))
        answers = {outcome.request.key: outcome for outcome in batches[-1]}
        try:
            asked = script.send([answers[request.key] for request in asked])
        except StopIteration:
            return batches


def test_groups_are_contiguous_and_hold_every_unit_once(make_space):
    space = make_space([[10, 0]] * 14)
    for count in (1, 3, 4, 50):
        groups = _make_groups(space, count)
        blocks = {unit.block for unit in space.units}
        assert len(groups) == min(count, len(blocks))
        assert [place for group in groups for place in group.places] == list(range(14))
        assert all(before.end <= after.start for before, after in itertools.pairwise(groups))
        sizes = [len(blocks & set(range(group.start, group.end))) for group in groups]
        assert max(sizes) - min(sizes) <= 1


def test_a_group_is_measured_alone_behind_its_pruned_predecessors(deep, landscape):
    """What comes before is the current network's, what comes after is not run, and its cost is 1/K of a whole one's."""
    batches = _batches(deep, landscape(deep))
    local = [batch for batch in batches if batch[0].request.blocks]
    assert local
    for batch in local:
        by_end: dict[int, list[tuple[int, ...]]] = {}
        for outcome in batch:
            by_end.setdefault(outcome.request.blocks, []).append(outcome.request.allocation)
        assert by_end.keys() <= {2, 4, 6, 8}
        for end, allocations in by_end.items():
            assert len({allocation[: end - 2] for allocation in allocations}) == 1
            assert {level for allocation in allocations for level in allocation[end:]} <= {0}
    behind = {o.request.allocation[:2] for batch in local for o in batch if o.request.blocks == 4}
    assert all(any(before) for before in behind), "predecessors are pruned"


def test_a_local_evaluation_costs_one_over_the_number_of_groups(deep):
    """Beside the one pass through what comes before, which a generation shares."""
    base, tokens = (2,) * 8, 64
    whole = candidate_tokens(deep, [Request(base, tokens)])[0]
    head = tokens * deep.fixed["macs"] / deep.cost(deep.dense, "macs")
    for end in (2, 4, 6, 8):
        others = [(*base[: end - 2], a, b, *[0] * (8 - end)) for a, b in [(2, 2), (1, 3), (3, 1), (4, 0)]]
        costs = candidate_tokens(deep, [Request(a, tokens, blocks=end) for a in others])
        alone = candidate_tokens(deep, [Request(others[0], tokens, blocks=end)])[0]
        assert alone == pytest.approx((whole - head) * end / 8)
        assert sum(costs) <= alone + 3 * tokens * 2 * 90 * 3 / deep.cost(deep.dense, "macs")
    assert candidate_tokens(deep, [Request((*base[:2], *[0] * 6), tokens, blocks=2)])[0] == pytest.approx(
        (whole - head) / 4
    )


def test_groups_evolve_side_by_side(deep, landscape):
    first = next(batch for batch in _batches(deep, landscape(deep)) if batch[0].request.blocks)
    assert {outcome.request.blocks for outcome in first} == {2, 4, 6, 8}


def test_every_local_front_point_is_plugged_into_the_current_network(deep, landscape):
    batches = _batches(deep, landscape(deep))
    joint = [b for b in batches if b[0].request.tokens == 64 and not b[0].request.blocks]
    assert len(joint) == SETTINGS.rounds
    for batch in joint:
        base, *plugged = [outcome.request.allocation for outcome in batch]
        for allocation in plugged:
            changed = {place // 2 for place in range(8) if allocation[place] != base[place]}
            assert len(changed) == 1, "one group differs"
        assert {next(p // 2 for p in range(8) if a[p] != base[p]) for a in plugged} == {0, 1, 2, 3}


@given(data=st.data())
def test_merging_is_exact(spaces, data):
    space = data.draw(spaces)
    objectives = data.draw(st.sampled_from([["params"], ["macs"], ["params", "macs"]]))
    groups = _make_groups(space, data.draw(st.integers(1, 3)))
    levels = [st.tuples(*(st.integers(0, space.units[p].num_levels - 1) for p in group.places)) for group in groups]
    options = [data.draw(st.lists(each, min_size=1, max_size=4, unique=True)) for each in levels]
    losses = [[data.draw(st.integers(-3, 9)) / 8 for _ in own] for own in options]

    def figures(picks):
        allocation = space.dense
        for group, own, pick in zip(groups, options, picks, strict=True):
            allocation = group.into(allocation, own[pick])
        total = sum(own[pick] for own, pick in zip(losses, picks, strict=True))
        return allocation, (total, *(space.cost(allocation, cost) for cost in objectives))

    limit = data.draw(st.integers(space.cost(space.sparsest, "macs"), space.cost(space.dense, "macs")))
    budget, costs = Budget(macs=limit), list(dict.fromkeys([*objectives, "macs"]))
    every = [figures(picks) for picks in itertools.product(*(range(len(own)) for own in options))]
    points = {point for allocation, point in every if fits(space, allocation, budget)}
    best = {p for p in points if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)}
    found = dict(every)
    merged = [found[a] for a in _merge(space, budget, objectives, costs, groups, options, losses)]
    assert set(merged) == best
    assert len(merged) == len(best)


def test_merged_schemes_are_measured_in_full_and_within_the_budget(deep, landscape):
    batches = _batches(deep, landscape(deep))
    schemes = [b for b in batches[1:] if b[0].request.tokens == 128]
    assert len(schemes) == SETTINGS.rounds
    assert all(1 <= len(batch) <= SETTINGS.schemes for batch in schemes)


def test_on_an_additive_loss_merged_schemes_are_near_the_true_front(deep, landscape):
    """With impairments that add up, what is merged is what is measured, up to the difference in tokens."""
    evaluator = landscape(deep, interaction=0.0)
    settings = EmoPmsSettings(groups=4, rounds=3, generations=4, population=16, schemes=24, profile=64, tokens=128)
    measured = [o for b in _batches(deep, evaluator, settings) for o in b if o.request.tokens == 128]
    costs, losses = np.array([deep.fixed["params"]]), np.zeros(1)  # of every allocation
    for unit, terms in zip(deep.units, evaluator.terms, strict=True):
        costs = np.add.outer(costs, unit.params).ravel()
        losses = np.add.outer(losses, terms).ravel()
    for share in (0.25, 0.5, 0.75):
        limit = deep.limit_for(share)
        found = min(o.loss for o in measured if deep.cost(o.request.allocation) <= limit)
        best = losses[costs <= limit].min()
        assert found <= 1.1 * best * (1 + 1 / 128)


def test_finalists_are_the_measured_front(deep, landscape):
    start = [uniform(deep, Budget(params=deep.limit_for(share))) for share in (0.25, 0.5, 0.75)]
    whole = Budget(params=deep.cost(deep.dense))
    searcher = SETTINGS.make(SearchProblem(space=deep, budget=whole, objectives=["kl", "params"], start=start))
    assert searcher.finalists() == []
    measured = []
    while requests := searcher.ask():
        outcomes = list(landscape(deep).evaluate(requests))
        measured += [outcome for outcome in outcomes if outcome.request.tokens == SETTINGS.tokens]
        searcher.tell(outcomes)
    front = [outcome.request.allocation for outcome in pareto_front(deep, measured, ["kl", "params"])]
    assert searcher.finalists() == front
    assert len(front) > 3


def test_rounds_go_on_from_the_middle_then_the_quarters_then_the_eighths():
    assert [_find_place(number) for number in range(7)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_a_round_goes_on_from_a_member_of_the_front(make_space):
    space = make_space([[100, 50, 0], [100, 50, 0]])
    known = {(0, 0): 0.0, (1, 0): 0.4, (0, 1): 0.1, (2, 1): 0.5, (2, 2): 0.9}
    span = (space.cost(space.sparsest), space.cost(space.dense))
    assert _find_nearest(space, "params", known, 0.75, span) == (0, 1)
    assert _find_nearest(space, "params", known, 0.25, span) == (2, 1)
    assert _find_nearest(space, "params", known, 0.0, span) == (2, 2)


def test_a_group_knows_its_part():
    group = _Group((1, 2), 0, 1)
    assert group.of((5, 6, 7, 8)) == (6, 7)
    assert group.into((5, 6, 7, 8), (1, 2)) == (5, 1, 2, 8)


@pytest.mark.parametrize("wrong", [{"groups": 0}, {"rounds": 0}, {"population": 3}, {"profile": 9000}, {"schemes": 0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"search\.emo_pms: expected groups, rounds, generations and schemes >= 1"):
        EmoPmsSettings(**wrong)


def test_features_are_what_local_evolution_sees(deep):
    """It follows the features' error, not the loss: where the two disagree, local fronts follow the former."""

    class Contrary:
        """Features are hurt by the first block of a group alone, the loss by the second."""

        def evaluate(self, requests):
            for request in requests:
                levels = np.array(request.allocation)
                if request.blocks:
                    yield Outcome(request, {FEATURES: float(levels[request.blocks - 2])}, 0.0, FEATURES)
                else:
                    yield Outcome(request, {"kl": float(levels[1::2].sum()), "nll": 0.0}, 0.0)

    settings = EmoPmsSettings(groups=4, rounds=1, generations=12, population=16, schemes=6, profile=64, tokens=128)
    batches = _batches(deep, Contrary(), settings)
    base, *plugged = [o.request.allocation for o in batches[-2]]
    for allocation in plugged:
        place = next(p for p in range(8) if allocation[p] != base[p]) // 2 * 2
        assert allocation[place] == 0 or allocation[place + 1] == 4, "the second block goes first"
