import numpy as np
import pytest
from pymoo.indicators.hv import HV

from allocator.core.budget import Budget, budget_for, denser_moves, fits, repair
from allocator.searchers.methods import bayesian
from allocator.searchers.methods.bayesian import Bayesian, GpSettings, TpeSettings
from allocator.searchers.methods.sweep import make_budgets
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.surrogates.shapes import Shapes

LADDERS = [[1000, 750, 500, 250, 0], [800, 700, 600, 500, 400, 300, 200, 100, 0]] * 12


def _maker(settings):
    return lambda space, budget, start, seed: Bayesian(
        SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=seed), settings
    )


def _two_ends(space, budget):
    units = range(len(space.units))
    return [repair(space, space.dense, budget, order) for order in (units, units[::-1])]


@pytest.mark.parametrize("settings", [TpeSettings(10, 4, 64), GpSettings(10, 4, 64)])
def test_the_starts_are_measured_and_then_trials_come_in_batches(run, make_space, settings):
    space = make_space(LADDERS)
    budget = budget_for(space, 0.5)
    starts, shapes = _two_ends(space, budget), Shapes(space)
    record = run(_maker(settings), space, start=[*starts, starts[0]])
    nearest = [shapes.allocation(shapes.nearest(start, budget), budget) for start in starts]
    assert [r.allocation for r in record.batches[0]] == list(dict.fromkeys([*starts, *nearest]))
    assert [len(batch) for batch in record.batches[1:]] == [4, 4]
    assert {r.tokens for batch in record.batches for r in batch} == {64}
    assert set(starts) <= set(record.finalists())


def test_points_of_a_front_fill_limits_of_their_own(make_space):
    space = make_space(LADDERS)
    starts = [start for target in (0.2, 0.7) for start in _two_ends(space, budget_for(space, target))]
    problem = SearchProblem(space=space, budget=budget_for(space, 0.1), objectives=["kl", "params"], start=starts)
    searcher = Bayesian(problem, TpeSettings(10, 4, 64))
    asked = [request.allocation for request in searcher.ask()]
    assert asked[:4] == starts
    assert len(asked) > 4
    limits = [Budget(params=space.cost(start)) for start in starts]
    for drawn in asked[4:]:
        assert any(fits(space, drawn, own) and not denser_moves(space, drawn, own) for own in limits)


@pytest.mark.parametrize("settings", [TpeSettings(40, 6, 64), GpSettings(22, 3, 64)], ids=["tpe", "gp"])
def test_killed_after_any_batch_it_goes_on_as_if_it_had_not_been(run, space, settings):
    whole = run(_maker(settings), space, seed=4)
    for done in range(len(whole.told)):
        searcher = _maker(settings)(space, budget_for(space, 0.5), [whole.batches[0][0].allocation], 4)
        for batch, told in zip(whole.batches[:done], whole.told[:done], strict=True):
            assert searcher.ask() == batch
            searcher.tell(told)
        np.random.seed(done)  # noqa: NPY002
        assert searcher.ask() == whole.batches[done]
        assert searcher.ask() == whole.batches[done], "asking changes nothing"


@pytest.fixture
def deep(make_space, landscape):
    """Makes a space and an additive landscape on it: first and last blocks matter, and attention more than the rest."""

    def deep(blocks):
        space = make_space(LADDERS[: 2 * blocks])
        depth = np.linspace(-1.0, 1.0, blocks)
        weight = np.repeat(0.2 + depth**2, 2) * np.tile([2.0, 1.0], blocks)
        additive = landscape(space, interaction=0.0)
        additive.terms = [
            w * np.array([u.sparsity(lv) for lv in range(u.num_levels)]) ** 2
            for w, u in zip(weight, space.units, strict=True)
        ]
        return space, additive

    return deep


@pytest.mark.parametrize(
    ("settings", "seed"), [(TpeSettings(120, 8, 64), 0), (TpeSettings(120, 8, 64), 1), (GpSettings(36, 4, 64), 0)]
)
def test_it_beats_random_search_where_sensitivity_is_a_matter_of_depth(run, deep, settings, seed):
    space, additive = deep(12)
    record = run(_maker(settings), space, seed=seed, evaluator=additive)
    evaluations = len({r.key for r in additive.requests})
    assert evaluations <= settings.trials + 1
    budget, rng = budget_for(space, 0.5), np.random.default_rng(seed)
    rivals = [rng.integers([u.num_levels for u in space.units]).tolist() for _ in range(evaluations)]
    by_chance = min(additive.kl(repair(space, r, budget, rng.permutation(24).tolist())) for r in rivals)
    even = additive.kl(record.batches[0][0].allocation)
    assert additive.kl(record.finalists()[0]) < 0.9 * min(by_chance, even)


@pytest.mark.parametrize(
    ("settings", "blocks", "seed"),
    [(TpeSettings(80, 8, 64), 12, 0), (TpeSettings(80, 8, 64), 12, 1), (GpSettings(26, 4, 64), 4, 0)],
)
def test_its_fronts_are_ahead_of_random_points_of_the_box(deep, settings, blocks, seed, monkeypatch):
    space, additive = deep(blocks)
    whole = Budget(params=space.cost(space.dense))
    starts = [uniform(space, each) for each in make_budgets(space, whole, ["params"], 3)]
    volumes = []
    for startup in (16, settings.trials):
        monkeypatch.setattr(bayesian, "_STARTUP_TRIALS", startup)
        problem = SearchProblem(space=space, budget=whole, objectives=["kl", "params"], start=starts, seed=seed)
        searcher = Bayesian(problem, settings)
        while requests := searcher.ask():
            searcher.tell(list(additive.evaluate(requests)))
        worst = max(additive.kl(start) for start in starts)
        points = [[additive.kl(found) / worst, 1 - space.sparsity(found)] for found in searcher.finalists()]
        volumes.append(HV(ref_point=np.ones(2))(np.array(points)))
    assert volumes[0] > 1.02 * volumes[1]


@pytest.mark.parametrize("settings", [TpeSettings(40, 4, 64), GpSettings(40, 4, 64)])
def test_one_unit_leaves_no_curve_to_choose(run, make_space, settings):
    record = run(_maker(settings), make_space([[100, 80, 60, 40, 20, 0]]))
    assert len(record.batches) == 1
    assert "no curve" in record.ended()
