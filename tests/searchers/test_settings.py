import pytest

from allocator.core.effort import Limit
from allocator.core.errors import UserError
from allocator.run.config.load import load_config
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.methods.nsga import NsgaSettings
from allocator.searchers.methods.presets import PRESETS, read_preset
from allocator.searchers.methods.thompson import ThompsonSettings
from allocator.searchers.methods.trust_region import TrustRegionSettings
from allocator.searchers.registry import METHODS, find_keys
from allocator.searchers.settings import SearchSettings


@pytest.mark.parametrize("wrong", [{"generations": 0}, {"population": 3}, {"tokens": 0}, {"profile": 9000}])
def test_nsga(wrong):
    with pytest.raises(UserError, match=r"search\.nsga"):
        NsgaSettings(**wrong)


def test_methods_serve_a_front_or_the_loss_alone():
    for method in (name for name, method in METHODS.items() if method.front != "none"):
        SearchSettings(method=method).check_objectives("kl", ["params", "kv_bytes"])
    for method in (name for name, method in METHODS.items() if method.front == "any"):
        SearchSettings(method=method).check_objectives("kl", ["params", "nll"])
        SearchSettings(method=method).check_objectives("kl", ["kl.a", "kl.b"])
        SearchSettings(method=method).check_objectives("kl", ["kl.a", "params"])
    for method in (name for name, method in METHODS.items() if method.one_budget):
        SearchSettings(method=method).check_objectives("kl", [])
    SearchSettings(method="nsga3", nsga=NsgaSettings(population=4)).check_objectives("kl", ["kl.a", "kl.b"])
    refused = {
        r"thompson serves the loss alone. Use --method sweep or nsga2": ("thompson", ["params"]),
        r"sweep serves the loss and costs alone. Use --method nsga2 or nsga3 or tpe": ("sweep", ["params", "nll"]),
        r"emo_pms serves the loss and costs alone": ("emo_pms", ["kl.a", "params"]),
        r"kl\.a alone makes no front. Name a cost": ("nsga2", ["kl.a"]),
        r"nsga3 finds a front, and nothing is an objective": ("nsga3", []),
    }
    for message, (method, objectives) in refused.items():
        with pytest.raises(UserError, match=message):
            SearchSettings(method=method).check_objectives("kl", objectives)
    with pytest.raises(UserError, match=r"search\.nsga\.population: 3 objectives take at least 6 members, found 4"):
        SearchSettings(method="nsga3", nsga=NsgaSettings(population=4)).check_objectives("kl", ["params", "macs"])
    with pytest.raises(UserError, match=r"search\.rounds: a front is searched in one round"):
        SearchSettings(method="sweep", rounds=2).check_objectives("kl", ["params"])


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"batch": 0}, {"tokens": 0}])
def test_tpe(wrong):
    with pytest.raises(UserError, match=r"search\.tpe"):
        TpeSettings(**wrong)


def test_evolution_alone_trains():
    trained = EvolutionSettings(training=(0, 512))
    assert SearchSettings(method="evolution", evolution=trained).training == 512
    assert SearchSettings(method="evolution").training == 0
    for method in (name for name in METHODS if "evolution" not in find_keys(name)):
        with pytest.raises(UserError, match=rf"evolution alone trains .* {method}\. Use search\.method=evolution"):
            SearchSettings(method=method, evolution=trained)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"batch": 0}, {"tokens": 0}])
def test_gp(wrong):
    with pytest.raises(UserError, match=r"search\.gp"):
        GpSettings(**wrong)


def test_a_gaussian_process_takes_few_trials():
    assert GpSettings(trials=300).trials == 300
    with pytest.raises(UserError, match=r"at most 300 trials.*found 301.*search\.method=tpe"):
        GpSettings(trials=301)


@pytest.mark.parametrize("wrong", [{key: 0} for key in ("trials", "patience", "batch", "tokens", "radius")])
def test_thompson(wrong):
    with pytest.raises(UserError, match=r"search\.thompson"):
        ThompsonSettings(**wrong)


def test_thompson_sampling_takes_few_trials():
    assert ThompsonSettings(trials=2000).trials == 2000
    with pytest.raises(UserError, match=r"at most 2000 measurements.*found 2001.*search\.method=evolution"):
        ThompsonSettings(trials=2001)


def test_tokens_are_those_of_the_method():
    own = {
        "evolution": EvolutionSettings(tokens=(8, 16), survivors=(2, 1)),
        "nsga": NsgaSettings(profile=16, tokens=32),
        "tpe": TpeSettings(tokens=64),
        "gp": GpSettings(tokens=128),
        "thompson": ThompsonSettings(tokens=256),
    }
    assert SearchSettings(method="evolution", **own).fidelities == (8, 16)
    assert SearchSettings(method="nsga2", **own).fidelities == (16, 32)
    assert SearchSettings(method="tpe", **own).fidelities == (64,)
    assert SearchSettings(method="gp", **own).fidelities == (128,)
    for method in (name for name in METHODS if find_keys(name)[0] == "tokens"):
        assert SearchSettings(method=method, tokens=(4, 12), **own).fidelities == (4, 12)
    assert SearchSettings(method="thompson", **own).fidelities == (256,)


@pytest.mark.parametrize("tokens", [(), (0, 8), (16, 8), (8, 8)])
def test_fidelities_increase(tokens):
    with pytest.raises(UserError, match=r"search\.tokens: expected increasing counts"):
        SearchSettings(tokens=tokens)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"radius": 0}, {"least_gain": 1.0}, {"least_gain": -0.1}])
def test_trust_region(wrong):
    with pytest.raises(UserError, match=r"search\.trust_region"):
        TrustRegionSettings(**wrong)


@pytest.mark.parametrize(
    "wrong", [{key: 0} for key in ("generations", "patience", "entrants", "survivors", "parents")] + [{"proposals": 2}]
)
def test_guided(wrong):
    with pytest.raises(UserError, match=r"search\.guided"):
        GuidedSettings(**wrong)


def test_a_budget_is_read_and_shared_by_rounds():
    assert SearchSettings(budget=300).limit() == Limit(300, "evaluations")
    assert SearchSettings(budget="3e5 tokens", rounds=3).limit() == Limit(1e5, "tokens")
    with pytest.raises(UserError, match=r"budget: expected an amount such as .*found '5 apples'"):
        SearchSettings(budget="5 apples")


def test_presets_hold_published_numbers_and_no_others():
    for name, patterns in PRESETS.items():
        for pattern in patterns:
            settings = EvolutionSettings(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in read_preset(name, pattern).items()}
            )
            assert SearchSettings(method=name, evolution=settings).fidelities == settings.tokens
    assert read_preset("evopress", "unstructured")["offspring"] == 64
    assert read_preset("darwinlm", "structured")["tokens"] == [1024, 2048, 4096, 8192]
    assert read_preset("tyr", "structured")["max_exchanges"] == 4
    with pytest.raises(UserError, match=r"darwinlm publishes numbers for structured .* none for n:m\. Use evolution"):
        read_preset("darwinlm", "n:m")
    with pytest.raises(UserError, match=r"tyr publishes .* none for unstructured\. Use evopress, evolution"):
        read_preset("tyr", "unstructured")


@pytest.mark.parametrize(
    ("assignments", "rounds"),
    [
        ([], 2),
        (["pattern=unstructured"], 2),
        (["search.rounds=1"], 1),
        (["pattern=n:m"], 1),
        (["search.method=evolution"], 1),
        (["ladder.sparsities=[1.0]"], 1),
    ],
)
def test_auto_searches_twice_where_it_may_choose_ladders(assignments, rounds):
    assert load_config(assignments=assignments).search.rounds == rounds
