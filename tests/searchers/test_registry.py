"""The door for search methods: what is registered, and what is handed in from Python."""

import pickle
from dataclasses import asdict, dataclass, replace

import pytest

from allocator.core.budget import Budget
from allocator.core.errors import UserError
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Request
from allocator.run.config.load import load_config
from allocator.run.config.run import RunConfig
from allocator.searchers.generator import GeneratorSearcher
from allocator.searchers.registry import METHODS, find_sections
from allocator.searchers.settings import SearchSettings
from allocator.searchers.study import Study, run_study

RELEASED = "method tokens budget rounds trust_region guided evolution steady sweep nsga emo_pms tpe gp thompson".split()
"""Keys under ``search`` that run files have. None is taken away."""

KEYS = [*RELEASED[:4], *find_sections()]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlyStarts:
    """A method that says nothing of its class: it measures the starts and ends."""

    tokens: int = 128
    name = "only starts"
    num_batches = 3
    lag = 0
    training = 0

    @property
    def fidelities(self):
        return (self.tokens,)

    def make(self, problem):
        scored = {}

        def run():
            outcomes = yield [Request(allocation=allocation, tokens=self.tokens) for allocation in problem.start]
            scored.update({outcome.request.allocation: outcome.loss for outcome in outcomes})
            return "the starts are measured"

        return GeneratorSearcher(run(), lambda: sorted(scored, key=scored.__getitem__))


def test_the_keys_of_run_files_are_those_of_the_registry():
    assert list(RunConfig().model_dump()["search"]) == KEYS
    assert list(asdict(SearchSettings())) == KEYS
    assert set(RELEASED) <= set(KEYS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_offers_the_whole_door(method):
    settings = SearchSettings(method=method)
    configured = settings.configured
    assert isinstance(configured, METHODS[method].settings)
    assert list(configured.fidelities) == sorted(set(configured.fidelities))
    assert configured.num_batches is None or configured.num_batches > 0
    assert configured.lag == (16 if method == "steady" else 0)
    assert configured.training == settings.training == 0
    assert callable(configured.make)
    assert settings.method_name == method
    assert settings.custom_identity() == {}
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_a_searcher_from_python_takes_the_place_of_a_method(space, landscape, tmp_path):
    settings = SearchSettings(method="tpe").with_custom(OnlyStarts())
    assert (settings.method, settings.method_name) == ("custom", "only starts")
    assert settings.custom_identity()["settings"] == {"tokens": 128}
    assert replace(settings, rounds=2).settings_for_round(1).configured == OnlyStarts()
    settings.check_objectives("kl", ["params"])
    budget = Budget(params=space.limit_for(0.5))
    study = Study(space=space, budget=budget, settings=settings, seed=0, selection_tokens=256)
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        decision = run_study(study, landscape(space), journal)
    assert decision.searched in (decision.uniform, decision.two_rate)
    assert decision.ended == "the starts are measured"


def test_files_say_custom_and_nothing_more(tmp_path):
    config = RunConfig()
    config = config.model_copy(update={"search": config.search.with_custom(OnlyStarts())})
    assert list(config.model_dump()["search"]) == KEYS
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(tmp_path / "run.yaml").search
    assert again.method == "custom"
    with pytest.raises(
        UserError, match=r"'custom' is a searcher .* pass it again as allocator\.search\(searcher=\.\.\.\)"
    ):
        _ = again.fidelities
    assert again.with_custom(OnlyStarts(tokens=64)).fidelities == (64,)


def test_custom_is_no_key_of_a_file():
    with pytest.raises(UserError, match=r"unknown key 'search\.custom'"):
        load_config(assignments=["search.custom=1"])
