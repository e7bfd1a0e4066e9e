"""The model of slopes and curvatures, on losses whose expansions are exact."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for
from allocator.core.protocols import Expansion, Outcome, Request
from allocator.searchers.solvers.space_arrays import SpaceArrays
from allocator.searchers.surrogates.memory import subtract
from allocator.searchers.surrogates.quadratic import Quadratic
from allocator.searchers.surrogates.surrogate import Difference
from allocator.testing import landscapes

ALL = landscapes.TOKENS * landscapes.SEQUENCES
FEW = 2 * landscapes.TOKENS
CENTRE = (2, 1, 3, 2, 0, 2, 1, 2)


def _bowl(seed=0, reach=3):
    return landscapes.bowl(seed, reach, num_units=8, num_levels=6)


def _model(bowl):
    return Quadratic(SpaceArrays(bowl.space, Budget(params=bowl.space.cost(bowl.space.dense))), ALL)


def _expand(model, bowl, centre, *fidelities):
    for tokens in fidelities:
        model.expand(bowl.outcome(Request(allocation=centre, tokens=tokens, probe="expansion")))


def _difference(bowl, one, other, tokens=ALL):
    return subtract(
        bowl.outcome(Request(allocation=one, tokens=tokens)), bowl.outcome(Request(allocation=other, tokens=tokens))
    )


def _moved(centre, unit, level):
    return (*centre[:unit], level, *centre[unit + 1 :])


def _step(bowl, centre, unit):
    """A step of one level, to a sparser one if there is any."""
    last = bowl.space.sparsest[unit]
    return _moved(centre, unit, centre[unit] + 1 if centre[unit] < last else centre[unit] - 1)


def _teach(model, bowl, centre, tokens, units):
    for unit in units:
        model.observe(_difference(bowl, _step(bowl, centre, int(unit)), centre, tokens))


def _taught(bowl, centre=CENTRE, tokens=ALL):
    """What a search knows when it begins."""
    model = _model(bowl)
    _expand(model, bowl, centre, ALL, tokens)
    _teach(model, bowl, centre, tokens, model.find_missing_curvatures(tokens))
    model.refresh(centre)
    return model


def _exact(bowl, centre, curvature_u):
    """The relative change with every level of every unit, [U, L]; beyond a last level, that again."""
    longest = max(unit.num_levels for unit in bowl.space.units)
    expansion = bowl.expansion(centre, ALL)
    rows = [
        np.pad(np.array(slope) + curvature * np.array(size), (0, longest - len(slope)), mode="edge")
        for slope, size, curvature in zip(expansion.slope, expansion.size, curvature_u, strict=True)
    ]
    return np.array(rows) / bowl.loss(centre)


def _random(bowl, rng):
    return tuple(int(rng.integers(unit.num_levels)) for unit in bowl.space.units)


@pytest.mark.parametrize("seed", range(3))
def test_the_landscape_s_expansion_and_optimum_are_exact(seed):
    bowl = landscapes.bowl(seed, num_units=5, num_levels=5)
    centre, budget = (1, 0, 2, 1, 1), budget_for(bowl.space, 0.5)
    whole, curvature_u = bowl.expansion(centre, ALL), bowl.curvature(ALL)
    for unit, each in enumerate(bowl.space.units):
        for level in range(each.num_levels):
            change = whole.slope[unit][level] + curvature_u[unit] * whole.size[unit][level]
            assert bowl.loss(_moved(centre, unit, level)) - bowl.loss(centre) == pytest.approx(change, abs=1e-12)
    every = np.stack(np.meshgrid(*(np.arange(unit.num_levels) for unit in bowl.space.units)), -1).reshape(-1, 5)
    within = [a for a in map(tuple, every.tolist()) if bowl.space.cost(a, "params") <= budget.limits["params"]]
    assert bowl.optimum(budget)[0] == pytest.approx(min(map(bowl.loss, within)), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_an_expansion_and_one_step_of_each_unit_tell_every_single_change(seed):
    bowl = _bowl(seed)
    model = _taught(bowl)
    assert not len(model.find_missing_curvatures(ALL))
    changes = np.zeros(model.table_ul.shape)
    for unit, each in enumerate(bowl.space.units):
        for level in range(changes.shape[1]):
            moved = _moved(CENTRE, unit, min(level, each.num_levels - 1))
            changes[unit, level] = bowl.loss(moved) / bowl.loss(CENTRE) - 1
    assert model.table_ul == pytest.approx(changes, abs=1e-9)


def test_at_another_centre_an_expansion_tells_all_without_new_steps():
    bowl, other = _bowl(), (0, 3, 1, 1, 2, 3, 0, 1)
    model = _taught(bowl)
    _expand(model, bowl, other, ALL)
    assert not len(model.find_missing_curvatures(ALL))
    model.refresh(other)
    assert model.table_ul == pytest.approx(_exact(bowl, other, bowl.curvature(ALL)), abs=1e-9)
    assert model.predict(np.array([other]))[0] == 0


def test_steps_on_few_tokens_tell_the_curvature_of_these_and_the_slopes_stay_those_of_all():
    bowl = _bowl()
    model = _taught(bowl, tokens=FEW)
    assert model.table_ul == pytest.approx(_exact(bowl, CENTRE, bowl.curvature(FEW)), abs=1e-9)


def test_steps_on_more_text_replace_those_on_less():
    bowl = _bowl()
    model = _taught(bowl, tokens=FEW)
    assert not len(model.find_missing_curvatures(FEW))
    assert len(model.find_missing_curvatures(ALL)) == 8
    _teach(model, bowl, CENTRE, ALL, range(8))
    model.refresh(CENTRE)
    assert model.table_ul == pytest.approx(_exact(bowl, CENTRE, bowl.curvature(ALL)), abs=1e-9)


def test_a_unit_of_which_no_step_is_known_is_as_curved_as_the_median_and_less_sure():
    bowl = _bowl()
    model = _model(bowl)
    _expand(model, bowl, CENTRE, ALL)
    _teach(model, bowl, CENTRE, ALL, range(1, 8))
    assert model.find_missing_curvatures(ALL).tolist() == [0]
    model.refresh(CENTRE)
    expected_u = bowl.curvature(ALL)
    expected_u[0] = np.median(expected_u[1:])
    assert model.table_ul == pytest.approx(_exact(bowl, CENTRE, expected_u), abs=1e-9)
    known = _taught(bowl)
    relative = model.deviation()[0, 4] / expected_u[0], known.deviation()[0, 4] / bowl.curvature(ALL)[0]
    assert relative[0] > 3 * relative[1] > 0


def test_a_unit_that_does_nothing_is_asked_once_and_teaches_nothing_about_others():
    bowl = _bowl()
    positions = tuple(0 * position if unit < 5 else position for unit, position in enumerate(bowl.positions))
    bowl = replace(bowl, positions=positions)
    model = _model(bowl)
    _expand(model, bowl, CENTRE, ALL)
    _teach(model, bowl, CENTRE, ALL, range(7))
    assert model.find_missing_curvatures(ALL).tolist() == [7]
    model.refresh(CENTRE)
    assert not model.table_ul[:5].any()
    assert not model.deviation()[:5].any()
    expected_u = bowl.curvature(ALL)
    expected_u[7] = np.median(expected_u[5:7])
    assert model.table_ul == pytest.approx(_exact(bowl, CENTRE, expected_u), abs=1e-9)


def test_a_step_that_does_nothing_tells_nothing_of_the_next():
    bowl = _bowl()
    positions = list(bowl.positions)
    positions[3] = positions[3].copy()
    positions[3][CENTRE[3] + 1] = positions[3][CENTRE[3]]
    bowl = replace(bowl, positions=tuple(positions))
    expected_u = bowl.curvature(ALL)
    expected_u[3] = np.median(np.delete(expected_u, 3))
    assert _taught(bowl).table_ul == pytest.approx(_exact(bowl, CENTRE, expected_u), abs=1e-9)


def test_ladders_of_one_level_need_no_step(make_space):
    space = make_space([[50], [40, 20, 0], [90], [10, 0]])
    bowl = landscapes.bowl(0, 3, space)
    model = _model(bowl)
    _expand(model, bowl, (0, 1, 0, 1), ALL)
    assert model.find_missing_curvatures(ALL).tolist() == [1, 3]
    _teach(model, bowl, (0, 1, 0, 1), ALL, [1, 3])
    model.refresh((0, 1, 0, 1))
    assert model.table_ul == pytest.approx(_exact(bowl, (0, 1, 0, 1), bowl.curvature(ALL)), abs=1e-9)
    assert not model.table_ul[[0, 2]].any()


@pytest.mark.parametrize("seed", range(3))
def test_differences_of_whole_allocations_correct_curvatures_that_few_tokens_told_wrongly(seed):
    bowl, rng = _bowl(seed, reach=0), np.random.default_rng(seed)
    model, wrong_u = _model(bowl), rng.choice([0.7, 1.4], size=8)
    _expand(model, bowl, CENTRE, ALL, FEW)
    few, false_u = bowl.expansion(CENTRE, FEW), wrong_u * bowl.curvature(ALL)
    for unit in range(8):
        step = _step(bowl, CENTRE, unit)
        change = few.slope[unit][step[unit]] + false_u[unit] * few.size[unit][step[unit]]
        model.observe(Difference(allocation=step, reference=CENTRE, value=change, tokens=FEW, error=None))
    model.refresh(CENTRE)
    told, before_ul, slope_ul = model.table_ul, model.deviation(), _exact(bowl, CENTRE, np.zeros(8))
    assert told == pytest.approx(_exact(bowl, CENTRE, false_u), abs=1e-9)
    for _ in range(60):
        one = list(CENTRE)
        for unit in rng.choice(8, 2, replace=False):
            one[unit] = int(rng.integers(bowl.space.units[unit].num_levels))
        model.observe(_difference(bowl, tuple(one), CENTRE))
    model.refresh(CENTRE)
    true = _exact(bowl, CENTRE, bowl.curvature(ALL))
    assert np.abs(model.table_ul - true).sum() < 0.5 * np.abs(told - true).sum()
    moved_ul = before_ul > 0
    surer = model.deviation()[moved_ul] / (model.table_ul - slope_ul)[moved_ul]
    assert (surer < before_ul[moved_ul] / (told - slope_ul)[moved_ul]).all()


def test_the_order_of_observations_is_irrelevant():
    bowl, rng = _bowl(), np.random.default_rng(0)
    others = [_difference(bowl, _random(bowl, rng), CENTRE, tokens) for tokens in (FEW, ALL) for _ in range(10)]
    tables = []
    for order in range(20), rng.permutation(20):
        model = _taught(bowl, tokens=FEW)
        for place in order:
            model.observe(others[place])
        model.refresh(CENTRE)
        tables.append(model.table_ul)
    assert tables[0] == pytest.approx(tables[1], rel=1e-9)


def test_differences_from_what_was_not_expanded_are_ignored():
    bowl = _bowl()
    model, before = _taught(bowl), _taught(bowl).table_ul
    model.observe(_difference(bowl, (0,) * 8, (1,) * 8))
    model.observe(_difference(bowl, CENTRE, CENTRE))
    model.refresh(CENTRE)
    assert np.array_equal(model.table_ul, before)


@given(
    seed=st.integers(0, 99),
    value=st.floats(-1.0, 1.0).filter(lambda value: value == 0 or abs(value) > 1e-9),
    tokens=st.integers(1, ALL - 1),
)
def test_an_estimate_is_between_what_was_measured_and_what_is_expected(seed, value, tokens):
    bowl = _bowl()
    model, rng = _taught(bowl, tokens=FEW), np.random.default_rng(seed)
    levels_nu = np.array([_random(bowl, rng)])
    expected = model.predict(levels_nu)[0]

    def estimate(on):
        mean_n, deviation_n = model.estimate(levels_nu, np.array([value]), on)
        return mean_n[0], deviation_n[0]

    assert estimate(ALL) == (pytest.approx(value, abs=1e-12), 0.0)
    mean, deviation = estimate(tokens)
    slack = 1e-12 * max(1.0, abs(expected))
    assert min(value, expected) - slack <= mean <= max(value, expected) + slack
    assert deviation >= 0
    # sequences that differ by more than any change of the loss say nothing
    model.observe(Difference(allocation=(0,) * 8, reference=CENTRE, value=0.1, tokens=FEW, error=1e9))
    model.refresh(CENTRE)
    assert estimate(FEW)[0] == pytest.approx(model.predict(levels_nu)[0], abs=1e-6)


def test_an_estimate_is_the_surer_the_more_tokens_there_are():
    bowl = _bowl()
    model, levels_nu = _taught(bowl), np.array([[0, 0, 3, 3, 0, 2, 1, 2]])
    deviations = [float(model.estimate(levels_nu, np.zeros(1), tokens)[1][0]) for tokens in (1, FEW, 2 * FEW, ALL)]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] == 0 < deviations[-2]


def test_nothing_is_unsure_about_the_centre_wherever_it_is():
    bowl = _bowl()
    model = _taught(bowl, tokens=FEW)
    for centre in (CENTRE, (0, 3, 1, 1, 2, 3, 0, 1)):
        model.refresh(centre)
        deviation_ul = model.deviation()
        assert not deviation_ul[np.arange(8), centre].any()
        assert (deviation_ul > 0).any(1).all()


def test_a_draw_is_a_function_of_the_generator_and_spreads_as_the_deviation_says():
    bowl = _bowl()
    model = _taught(bowl, tokens=FEW)
    rng = np.random.default_rng(1)
    for _ in range(5):
        model.observe(_difference(bowl, _random(bowl, rng), CENTRE))
    model.refresh(CENTRE)
    first, again, other = (model.draw(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not first[np.arange(8), CENTRE].any()
    many = np.array([model.draw(rng) for _ in range(4000)])
    deviation_ul = model.deviation()
    assert np.allclose(many.mean(0), model.table_ul, atol=0.1 * deviation_ul.max())
    assert np.allclose(many.std(0), deviation_ul, rtol=0.1)


def test_a_sample_of_a_loss_that_is_not_convex_still_differs_from_the_next():
    bowl = replace(_bowl(), forms=-_bowl().forms)
    model = _taught(bowl)
    assert model.draw(np.random.default_rng(0)) != pytest.approx(model.draw(np.random.default_rng(1)), rel=1e-3)


def test_a_loss_that_rounding_made_negative_turns_no_table_around():
    bowl = _bowl()
    expansion = bowl.expansion(CENTRE, ALL)
    tables = []
    for loss in (1e-9, -1e-9):
        model = _model(bowl)
        model.expand(
            Outcome(
                request=Request(allocation=CENTRE, tokens=ALL, probe="expansion"),
                measured={"kl": loss},
                wall_s=0.0,
                expansion=expansion,
            )
        )
        model.refresh(CENTRE)
        tables.append(model.table_ul)
    assert np.array_equal(*tables)


@given(
    data=st.data(),
    loss=st.sampled_from([0.0, -1e-9, 1e-12, 1.0, 1e6]),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e6]),
)
def test_numbers_stay_finite(data, loss, scale):
    bowl, rng = _bowl(), np.random.default_rng(data.draw(st.integers(0, 99)))
    zero_u = rng.random(8) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))

    scale_u = np.where(zero_u, 0.0, scale)

    def rows(draw):
        return tuple(
            tuple(0.0 if level == own else float(size * draw()) for level in range(unit.num_levels))
            for unit, own, size in zip(bowl.space.units, CENTRE, scale_u, strict=True)
        )

    model = _model(bowl)
    for tokens in (ALL, FEW):
        expansion = Expansion(rows(rng.normal), rows(rng.random))
        request = Request(allocation=CENTRE, tokens=tokens, probe="expansion")
        model.expand(Outcome(request=request, measured={"kl": loss}, wall_s=0.0, expansion=expansion))
    known = [unit for unit in range(8) if rng.random() < data.draw(st.sampled_from([0.0, 0.5, 1.0]))]
    steps = [_step(bowl, CENTRE, unit) for unit in known]
    for one in [*steps, *(_random(bowl, rng) for _ in range(data.draw(st.integers(0, 5))))]:
        error = data.draw(st.sampled_from([None, 0.0, 0.1]))
        # negative ones too: concave losses
        value, tokens = float(rng.normal()), data.draw(st.sampled_from([FEW, ALL]))
        model.observe(Difference(allocation=one, reference=CENTRE, value=value, tokens=tokens, error=error, mean=1.0))
    model.refresh(CENTRE)
    levels_nu = np.array([CENTRE, *(_random(bowl, rng) for _ in range(4))])
    for found in (
        model.table_ul,
        model.cautious(),
        model.deviation(),
        model.draw(rng),
        model.predict(levels_nu),
        *model.estimate(levels_nu, rng.normal(size=5), FEW),
        *model.estimate(levels_nu, rng.normal(size=5), ALL),
    ):
        assert np.isfinite(found).all()
