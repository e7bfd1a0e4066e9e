"""Searches of whole fronts: one contract for all, and what each promises beyond it."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, fits
from allocator.core.effort import candidate_tokens
from allocator.core.front import knee, pareto_front
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.core.space import SearchSpace
from allocator.searchers.methods import nsga as nsga_module
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.emo_pms import EmoPmsSettings
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.methods.nsga import NsgaSettings
from allocator.searchers.methods.sweep import SweepSettings, make_budgets
from allocator.searchers.registry import METHODS
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.settings import SearchSettings
from allocator.searchers.solvers.knapsack import additive_front
from allocator.searchers.study import Study, run_study
from allocator.testing import FrontContract, landscapes
from allocator.testing.fronts import find_size, follow
from allocator.testing.spaces import make_uneven_space
from allocator.testing.suites import make_suites

KEYS = {
    "tokens": (64, 128),
    "sweep": SweepSettings(points=4, entrants=4),
    "nsga": NsgaSettings(generations=5, population=8, profile=64, tokens=128),
    "emo_pms": EmoPmsSettings(groups=3, rounds=2, generations=3, population=6, schemes=8, profile=64, tokens=128),
    "tpe": TpeSettings(trials=40, batch=8, tokens=128),
    "gp": GpSettings(trials=19, batch=7, tokens=128),
}
"""Keys under ``search`` of small searches. A section that is not here has its defaults."""

FRONTS = [name for name, method in METHODS.items() if method.front != "none"]
TWICE = SearchSettings(method="sweep", tokens=(32, 64, 128), sweep=SweepSettings(points=3, entrants=3, passes=2))
CASES = {name: SearchSettings(method=name, **KEYS) for name in FRONTS} | {"sweep, twice": TWICE}


def _attributes(settings):
    return {"settings": settings.configured, "several_losses": METHODS[settings.method].front == "any"}


globals().update(make_suites(FrontContract, {name: _attributes(settings) for name, settings in CASES.items()}))


def test_every_method_of_fronts_is_under_the_contract():
    assert {f"Test_{name}" for name in FRONTS} <= globals().keys()


known_directions = functools.cache(nsga_module.get_reference_directions)


@pytest.fixture(autouse=True)
def spread_once(request, monkeypatch):
    """The directions of NSGA-III take a second, and are the same for a seed: the test of seeds sees to that."""
    if "seeds" not in request.node.name:
        monkeypatch.setattr(nsga_module, "get_reference_directions", known_directions)


def _whole(space):
    return Budget(params=space.cost(space.dense))


@given(data=st.data())
def test_budgets_are_reachable_different_andfind_size(spaces, data):
    space = data.draw(spaces)
    objectives = data.draw(st.sampled_from([["params"], ["macs"], ["params", "macs"]]))
    within = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    found = make_budgets(space, within, objectives, data.draw(st.integers(1, 16)))
    assert found
    for budget in found:
        assert fits(space, space.sparsest, budget)
        assert budget.limits["params"] <= within.limits["params"]
        assert budget.limits.keys() in ({"params"}, {"params", *objectives})


def test_budgets_go_from_loose_to_tight(space):
    dense = Budget(params=space.cost(space.dense))
    limits = [budget.limits["params"] for budget in make_budgets(space, dense, ["params"], 12)]
    assert len(limits) == 12
    assert limits == sorted(set(limits), reverse=True)
    assert limits[0] < space.cost(space.dense)
    assert limits[-1] > space.cost(space.sparsest)
    grid = make_budgets(space, dense, ["params", "macs"], 12)
    assert len(grid) == 15
    assert len({tuple(budget.limits.values()) for budget in grid}) == 15


def _hypervolume(space, outcomes, worst):
    """Of two objectives, by hand: the area that a front dominates, of the box from nothing to the worst loss."""
    front = pareto_front(space, [o for o in outcomes if o.loss < worst], ["kl", "params"])
    area, before = 0.0, 1.0
    for outcome in front:
        size = find_size(space, outcome)
        area += (before - size) * (1 - outcome.loss / worst)
        before = size
    return area


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_is_ahead_of_nsga2_for_less(seed):
    space = make_uneven_space(seed, 16, 9)
    worst = landscapes.bowl(seed, reach=3, space=space, length=16).loss(uniform(space, Budget(params=_middle(space))))
    found = {}
    for method in ("sweep", "nsga2"):
        nsga = NsgaSettings(generations=40, population=24, profile=32, tokens=128)
        settings = SearchSettings(method=method, tokens=(32, 64, 128), nsga=nsga)
        followed = follow(settings.configured, space, landscapes.bowl(seed, reach=3, space=space, length=16), seed=seed)
        spent = sum(sum(candidate_tokens(space, [o.request for o in batch])) for batch in followed.told)
        found[method] = spent, _hypervolume(space, followed.measured, worst)
    assert found["sweep"][0] < found["nsga2"][0]
    assert found["sweep"][1] >= found["nsga2"][1]


def _middle(space):
    return (space.cost(space.dense) + space.cost(space.sparsest)) // 2


def test_a_front_of_an_additive_loss_is_exact_where_budgets_are(make_space, landscape):
    space = make_space([[100, 80, 60, 40, 20, 0], [70, 50, 30, 10], [90, 60, 30, 0], [50, 40, 30, 20]])
    evaluator = landscape(space, interaction=0.0)
    settings = SearchSettings(method="sweep", tokens=(64, 128), sweep=SweepSettings(points=6, entrants=12, passes=4))
    measured = follow(settings.configured, space, evaluator).measured
    exact = additive_front(space, "params", [term.tolist() for term in evaluator.terms])
    for budget in make_budgets(space, _whole(space), ["params"], 6):
        least = min(value for cost, value, _ in exact if cost <= budget.limits["params"])
        found = min(evaluator.kl(o.request.allocation) for o in measured if fits(space, o.request.allocation, budget))
        assert found <= 1.02 * least


@pytest.fixture
def decided(space, landscape, tmp_path):
    def decide_with(settings, budget=None, knee_=True, evaluator=None, name="journal", objectives=("params",)):
        path = tmp_path / f"{name}.jsonl"
        header = JournalHeader(space=space)
        with Journal.resume(path) if path.exists() else Journal.create(path, header) as journal:
            study = Study(
                space=space,
                budget=budget or _whole(space),
                objectives=objectives,
                settings=settings,
                seed=0,
                selection_tokens=256,
                at_knee=knee_,
            )
            chosen = run_study(study, evaluator or landscape(space), journal)
            return chosen, list(journal)

    return decide_with


def test_members_are_selected_on_text_of_their_own_and_the_knee_is_the_plan(decided, space):
    decision, outcomes = decided(CASES["sweep"])
    selected = [o for o in outcomes if o.request.split == "selection"]
    front = pareto_front(space, selected, ["kl", "params"])
    figures = np.array([[o.loss, space.cost(o.request.allocation)] for o in front])
    worst = max(o.loss for o in outcomes[:3])
    low, high = space.cost(space.sparsest), space.cost(space.dense)
    bend = figures[:, 0] / worst + (figures[:, 1] - low) / (high - low)
    assert decision.searched == front[int(bend.argmin())].request.allocation
    before = outcomes[: outcomes.index(selected[0])]
    searched = [o for o in before if o.request == Request(allocation=o.request.allocation, tokens=128)]
    members = {o.request.allocation for o in pareto_front(space, searched, ["kl", "params"])}
    assert {o.request.allocation for o in selected} <= members
    own = Budget(params=space.cost(decision.searched))
    assert decision.uniform == uniform(space, own)
    assert fits(space, decision.two_rate, own)


def test_with_a_target_the_member_of_least_loss_is_the_plan(decided, space):
    budget = Budget(params=space.limit_for(0.5))
    decision, outcomes = decided(CASES["nsga2"], budget, knee_=False)
    selected = [o for o in outcomes if o.request.split == "selection"]
    assert decision.losses["selection"] == min(o.loss for o in selected)
    assert fits(space, decision.searched, budget)


def test_a_finished_decision_is_replayed_without_measuring(decided, refusing):
    first, _ = decided(CASES["sweep"])
    again, _ = decided(CASES["sweep"], evaluator=refusing)
    assert again == first


def test_the_knee_is_where_a_front_bends():
    def bend(points, reference):
        return knee(np.array(points), np.zeros(len(reference)), np.array(reference))

    assert bend([[0.0, 10.0], [1.0, 1.0], [10.0, 0.0]], [10.0, 10.0]) == 1
    assert bend([[3.0, 3.0]], [10.0, 10.0]) == 0
    assert bend([[0.0, 5.0, 5.0], [1.0, 0.0, 5.0], [1.2, 0.0, 0.0]], [10.0, 10.0, 10.0]) == 2


def test_what_has_lost_everything_does_not_move_the_knee():
    points = [[0.1, 9.0], [0.5, 5.0], [2.0, 3.0], [900.0, 0.0]]
    ideal, reference = np.zeros(2), np.array([4.0, 10.0])
    assert knee(np.array(points), ideal, reference) == knee(np.array(points[:-1]), ideal, reference) == 1


@given(data=st.data())
def test_fronts_of_three_objectives_are_non_dominated_and_complete(data):
    levels = st.tuples(*(st.integers(0, 3) for _ in range(3)))
    losses = data.draw(st.dictionaries(levels, st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=20))
    space = SearchSpace.from_json(
        {
            "pattern": "structured",
            "fixed": {"params": 1, "macs": 1},
            "units": [
                {
                    "name": f"u{index}",
                    "kind": "channels",
                    "part": "mlp",
                    "block": index,
                    "total": 3,
                    "kept": [3, 2, 1, 0],
                    "params": [9, 5, 2, 0],
                    "macs": [4, 4 - index, 1, 0],
                    "group": None,
                }
                for index in range(3)
            ],
        }
    )
    outcomes = [
        Outcome(request=Request(allocation=allocation, tokens=64), measured={"kl": loss, "nll": 0.0}, wall_s=0.0)
        for allocation, loss in losses.items()
    ]
    front = pareto_front(space, outcomes, ["kl", "params", "macs"])

    def figures(outcome):
        allocation = outcome.request.allocation
        return outcome.loss, space.cost(allocation), space.cost(allocation, "macs")

    def beats(one, other):
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    every = {figures(outcome) for outcome in outcomes}
    expected = {one for one in every if not any(beats(other, one) for other in every)}
    assert [figures(outcome) for outcome in front] == sorted(expected)
    assert not any(beats(*pair) for pair in itertools.permutations(map(figures, front), 2))


@pytest.mark.parametrize("wrong", [{"points": 0}, {"passes": 0}, {"entrants": 0}, {"survivors": 0}])
def test_settings_of_a_sweep(wrong):
    with pytest.raises(ValueError, match=r"search\.sweep: every setting must be at least 1"):
        SweepSettings(**wrong)
    assert GuidedSettings(entrants=SweepSettings().entrants)
