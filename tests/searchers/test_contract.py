"""The contract of every searcher. A new method is tested as soon as it is in ``METHODS``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allocator.core.budget import Budget, budget_for, repair
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.searchers.loop import Measurer, search
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.methods.steady import SteadySettings
from allocator.searchers.methods.thompson import ThompsonSettings
from allocator.searchers.methods.trust_region import TrustRegionSettings
from allocator.searchers.registry import METHODS, find_keys
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.rules.measured import MEASURED_RULES, RuleTokens, make_rule_searcher
from allocator.searchers.settings import SearchSettings
from allocator.testing import SearcherContract
from allocator.testing.spaces import make_space
from allocator.testing.suites import make_suites

EVOLUTION = EvolutionSettings(generations=5, offspring=6, tokens=(64, 128), survivors=(2, 1))
CHEAP = {
    "tokens": (64, 128),
    "trust_region": TrustRegionSettings(rounds=3, radius=2),
    "guided": GuidedSettings(generations=4, proposals=64, entrants=6, survivors=2),
    "evolution": EVOLUTION,
    "steady": SteadySettings(trials=60, lag=0, tokens=(64, 128)),
    "tpe": TpeSettings(trials=26, batch=4, tokens=128),
    "gp": GpSettings(trials=18, batch=4, tokens=128),
    "thompson": ThompsonSettings(trials=30, batch=4, tokens=128),
}
"""Keys under ``search`` of small searches. A section that is not here has its defaults."""

PUBLISHED = ("max_exchanges", "within_kind")
"""What distinguishes the published presets once they are small."""

UNSEEDED = ("trust_region",)
"""Methods that draw nothing."""


def _settings(method, **keys):
    return SearchSettings(method=method, **{**CHEAP, **keys}).configured


def _of(method):
    """Return the settings of a registered method, small; of a preset, with what its paper does."""
    patterns = METHODS[method].presets
    if patterns is None:
        return _settings(method)
    published = next(iter(patterns.values()))
    return _settings(method, evolution=replace(EVOLUTION, **{key: published[key] for key in PUBLISHED}))


CASES = {
    **{name: _of(name) for name, method in METHODS.items() if method.one_budget},
    "evolution, one stage": _settings("evolution", evolution=replace(EVOLUTION, tokens=(128,), survivors=(1,))),
    "evolution with training": _settings("evolution", evolution=replace(EVOLUTION, training=(0, 256))),
    "evolution within kinds": _settings("evolution", evolution=replace(EVOLUTION, within_kind=True)),
    "auto, three fidelities": _settings("auto", tokens=(32, 64, 128)),
    "auto, one fidelity": _settings("auto", tokens=(128,)),
}


def _attributes(name):
    return {"settings": CASES[name], "draws": name not in UNSEEDED}


def _learns(name):
    """Whether a method learns from expansions."""
    return bool({"trust_region", "guided"} & {*find_keys(name.partition(",")[0])})


LEARNING = [name for name in CASES if _learns(name)]


class LearningContract(SearcherContract):
    """What methods promise that ask for expansions, whether they are told them or not."""

    @pytest.mark.parametrize("ladders", [[[50], [40], [30]], [[50, 20], [40, 0]]], ids=["no choice", "a dense budget"])
    def test_where_one_allocation_alone_fills_the_budget_it_is_found(self, ladders):
        space = make_space(ladders)
        evaluator = self.landscape(space)
        if self.expansions:  # as the divergence of the dense model from itself
            evaluator = replace(evaluator, lowest=np.zeros_like(evaluator.lowest))
            assert evaluator.loss(space.dense) == 0.0
        searcher = self.make(space, Budget(params=space.cost(space.dense)), [space.dense], 0)
        while requests := searcher.ask():
            searcher.tell(list(evaluator.evaluate(requests)))
        assert list(searcher.finalists()) == [space.dense]
        assert searcher.ended()


class ToldContract(LearningContract):
    """What these methods promise where the evaluator has gradients."""

    expansions = True

    def test_a_journal_cut_anywhere_is_continued(self, space, tmp_path):
        budget = budget_for(space, 0.5)
        start = [repair(space, space.sparsest, budget, range(len(space.units)))]

        def go(path, evaluator):
            journal = Journal.resume(path) if path.exists() else Journal.create(path, JournalHeader(space=space))
            with journal:
                searcher = self.make(space, budget, start, 0)
                search(searcher, Measurer(evaluator, journal))
            return searcher.finalists(), path.read_bytes()

        finalists, whole = go(tmp_path / "whole.jsonl", self.landscape(space))
        assert b'"expansion"' in whole
        lines = whole.splitlines(keepends=True)
        for kept in (1, 2, 3, 4, len(lines) // 2, len(lines) - 1, len(lines)):
            path, evaluator = tmp_path / f"{kept}.jsonl", self.landscape(space)
            # a crash tears the next line
            path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:40] if kept < len(lines) else b""))
            assert go(path, evaluator) == (finalists, whole)
            assert len(evaluator.requests) == len(lines) - kept

    def test_expansions_are_asked_of_what_was_measured_and_once(self, space, tmp_path):
        record = self.run(tmp_path, space)
        requests = [request for batch in record.batches for request in batch]
        expanded = [request for request in requests if request.probe]
        assert expanded
        assert len({request.key for request in expanded}) == len(expanded)
        plain = {request.key for request in requests if not request.probe}
        assert all(replace(request, probe="").key in plain for request in expanded)


class RuleContract(SearcherContract):
    """What the rules promise that measure."""

    rule = ""
    tokens = 128
    draws = False
    test_the_settings_can_be_recorded = None  # a rule has none
    test_what_cannot_be_measured_is_never_the_best = None  # a rule has no second choice

    def make(self, space, budget, start, seed):
        target, tokens = min(0.99, max(0.01, space.sparsity(uniform(space, budget)))), RuleTokens(64, 128)
        return make_rule_searcher(MEASURED_RULES[self.rule].run(space, budget, target, tokens), start, tokens)


globals().update(make_suites(SearcherContract, {name: _attributes(name) for name in CASES if not _learns(name)}))
globals().update(make_suites(LearningContract, {name: _attributes(name) for name in LEARNING}))
globals().update(make_suites(ToldContract, {f"{name}, told expansions": _attributes(name) for name in LEARNING}))
globals().update(  # the two-rate sweep serves no space of one part alone
    make_suites(RuleContract, {name: {"rule": name} for name in sorted(MEASURED_RULES.keys() - {"two_rate"})})
)


def test_every_method_is_under_a_contract():
    fronts = {name for name, method in METHODS.items() if not method.one_budget}
    assert {f"Test_{name}" for name in METHODS.keys() - fronts} <= globals().keys()
