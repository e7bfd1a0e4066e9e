from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, denser_moves, fits, repair
from allocator.core.effort import Limit
from allocator.core.errors import UserError
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.space import SearchSpace, Unit
from allocator.searchers.coarse_to_fine import REACH, Round, fill_budget, refine_ladders, translate
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.settings import SearchSettings
from allocator.searchers.study import Study, run_study


def _unit(index, total, counts, price, group=None):
    kept = tuple(sorted({total, *counts}, reverse=True))
    costs = tuple(count * price for count in kept)
    part = "mlp" if index % 2 else "attention"
    return Unit(
        name=f"unit{index}",
        kind="channels",
        part=part,
        block=index // 2,
        total=total,
        kept=kept,
        params=costs,
        macs=costs,
        group=group,
    )


def _finer(space, ladders):
    """Another ladder for every unit: what keeps a whole number of items of every group and is nearest to a share."""
    units = []
    for index, unit in enumerate(space.units):
        groups = unit.num_groups
        counts = [round(unit.total * (1 - sparsity) / groups) * groups for sparsity in ladders[unit.name]]
        units.append(_unit(index, unit.total, counts, unit.params[0] // unit.total, unit.group))
    return SearchSpace(space.pattern, tuple(units), space.fixed)


def _eighths(*totals):
    units = [_unit(i, total, [total * e // 8 for e in range(8)], 3) for i, total in enumerate(totals)]
    return SearchSpace("structured", tuple(units), {"params": 10, "macs": 10})


@st.composite
def _spaces(draw):
    """Ladders of any counts; groups of any size."""
    units = []
    for index in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([1, 1, 2, 4]))
        size = draw(st.integers(1, 300))
        counts = draw(st.lists(st.integers(0, size), max_size=10))
        group = None if groups == 1 else size
        units.append(_unit(index, size * groups, [c * groups for c in counts], draw(st.integers(1, 9)), group))
    return SearchSpace("structured", tuple(units), {"params": 7, "macs": 7})


def _allocations(draw, space, count):
    levels = [st.integers(0, unit.num_levels - 1) for unit in space.units]
    return [tuple(draw(level) for level in levels) for _ in range(count)]


@given(data=st.data())
def test_ladders_hold_what_is_named_and_both_ends(data):
    space = data.draw(_spaces())
    incumbent, *others = _allocations(data.draw, space, 3)
    ladders = refine_ladders(space, incumbent, others)
    finer = _finer(space, ladders)
    for index, (before, after) in enumerate(zip(space.units, finer.units, strict=True)):
        ladder = ladders[before.name]
        assert all(0.0 < sparsity <= 1.0 for sparsity in ladder)
        assert list(ladder) == sorted(set(ladder))
        assert (after.kept[0], after.kept[-1]) == (before.total, before.kept[-1])
        assert all(a > b for a, b in pairwise(after.kept))
        assert {before.kept[a[index]] for a in (incumbent, *others)} <= set(after.kept)
        assert after.num_levels <= 2 * REACH + 1 + 2 + len(others)
    for allocation in (incumbent, *others):
        assert finer.cost(translate(allocation, space, finer)) == space.cost(allocation)


@given(data=st.data())
def test_what_an_incumbent_leaves_over_is_filled(data):
    space = data.draw(_spaces())
    budget = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    incumbent = repair(space, space.dense, budget, range(len(space.units)))
    finer = _finer(space, refine_ladders(space, incumbent, []))
    start = fill_budget(finer, same := translate(incumbent, space, finer), budget)
    assert all(a <= b for a, b in zip(start, same, strict=True))
    assert fits(finer, start, budget)
    assert denser_moves(finer, start, budget) == []


@pytest.mark.parametrize("level", range(9))
def test_the_step_is_halved_in_every_round(level):
    """Týr's steps: 12.5 %, 6.25 %, 3.125 %, 1.5625 %."""
    space = _eighths(960, 960)
    allocation, centre = (level, 4), space.units[0].kept[level]
    for step in (60, 30, 15):
        finer = _finer(space, refine_ladders(space, allocation, []))
        wanted = {centre + steps * step for steps in range(-REACH, REACH + 1)} & {*range(961)}
        assert {*finer.units[0].kept} == wanted | {960, 0}
        allocation, space = translate(allocation, space, finer), finer


def test_few_items_keep_every_count():
    space = SearchSpace("structured", (_unit(0, 4, range(4), 5), _unit(1, 8, range(0, 8, 2), 5, 4)), {"params": 0})
    for _ in range(3):
        space = _finer(space, refine_ladders(space, (1, 2), []))
        assert space.units[0].kept == (4, 3, 2, 1, 0)
        assert space.units[1].kept == (8, 6, 4, 2, 0)


def test_a_unit_that_never_moves_stays_so():
    space = SearchSpace("structured", (_unit(0, 9, [], 1), _unit(1, 8, [4, 0], 1)), {"params": 0})
    assert refine_ladders(space, (0, 1), []) == {"unit0": (), "unit1": (0.25, 0.5, 0.75, 1.0)}


# --- a round that follows another -----------------------------------------------------------------------------

SETTINGS = SearchSettings(
    evolution=EvolutionSettings(generations=4, patience=4, offspring=6, tokens=(64, 128), survivors=(2, 1)), rounds=2
)


@pytest.fixture
def begun():
    """A finer space, and what the second round begins with."""
    space = _eighths(960, 96, 960, 96, 960, 96)
    budget = Budget(params=space.limit_for(0.47))
    incumbent = repair(space, (1, 7, 3, 2, 5, 4), budget, range(6))
    even = repair(space, (3,) * 6, budget, range(6))
    uneven = repair(space, (8, 3) * 3, budget, range(6))
    finer = _finer(space, refine_ladders(space, incumbent, [even, uneven]))
    chosen, even, uneven = (translate(a, space, finer) for a in (incumbent, even, uneven))
    return finer, budget, Round(fill_budget(finer, chosen, budget), even, uneven, ({"evaluations": 3},))


def test_the_incumbent_competes_with_what_is_found(begun, landscape, refusing, tmp_path):
    space, budget, round_ = begun
    study = Study(space=space, budget=budget, settings=SETTINGS, seed=3, selection_tokens=256, round=round_)
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        decision = run_study(study, landscape(space), journal)
        selected = {o.request.allocation: o.loss for o in journal if o.request.split == "selection"}
        first = next(iter(journal)).request.allocation
        assert run_study(study, refusing, journal) == decision
    assert first == round_.uniform == decision.uniform
    assert decision.two_rate == round_.two_rate
    assert decision.losses["incumbent"] == selected[round_.incumbent]
    assert decision.losses["selection"] == min(selected.values()) <= decision.losses["incumbent"]
    assert denser_moves(space, decision.searched, budget) == []


def test_an_incumbent_that_nothing_beats_is_chosen(begun, landscape, tmp_path):
    space, budget, round_ = begun

    class Jealous(landscape):
        """On the selection split, only the incumbent is good."""

        def evaluate(self, requests):
            for request, outcome in zip(requests, super().evaluate(requests), strict=True):
                good = request.split == "selection" and request.allocation == round_.incumbent
                outcome.measured["kl"] *= 0.01 if good else 1.0
                yield outcome

    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        study = Study(space=space, budget=budget, settings=SETTINGS, seed=3, selection_tokens=256, round=round_)
        decision = run_study(study, Jealous(space), journal)
    assert decision.searched == round_.incumbent


def test_what_a_round_begins_with_survives_the_file(begun):
    assert Round.from_json(begun[2].to_json()) == begun[2]
    assert begun[2].number == 2


def test_a_round_that_another_follows_is_brief(begun, landscape, tmp_path):
    """It selects nothing, and `auto` ends with its trust region, on fewer tokens."""
    space, budget, _ = begun
    settings = SearchSettings(rounds=2, tokens=(64, 128, 256))
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        study = Study(space=space, budget=budget, settings=settings, seed=0, selection_tokens=256)
        decision = run_study(study, landscape(space), journal)
    assert {outcome.request.split for outcome in journal} == {"search"}
    assert {outcome.request.tokens for outcome in journal} == {64, 128}
    assert decision.losses.keys() == {"search"}
    whole = [o for o in journal if o.request.tokens == 128 and fits(space, o.request.allocation, budget)]
    assert decision.losses["search"] == min(
        o.loss for o in whole if not denser_moves(space, o.request.allocation, budget)
    )
    assert "trust region" in decision.ended


def test_rounds_share_the_budget():
    settings = SearchSettings(budget="300 evaluations", rounds=3)
    assert settings.limit() == Limit(100, "evaluations")
    assert settings.limit([{"evaluations": 40}]) == Limit(130, "evaluations")
    assert settings.limit([{"evaluations": 40}, {"evaluations": 200}]) == Limit(100, "evaluations")
    assert SearchSettings(budget="3 minutes", rounds=3).limit([{"evaluations": 40}]) == Limit(1, "minutes")
    assert SearchSettings(rounds=3).limit() is None
    with pytest.raises(UserError, match=r"search\.rounds"):
        SearchSettings(rounds=0)
