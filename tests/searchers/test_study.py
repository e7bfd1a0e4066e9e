from dataclasses import dataclass, replace

import numpy as np
import pytest

from allocator.core.budget import budget_for, denser_moves, fits
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.searchers.generator import GeneratorSearcher
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.evolution import EvolutionSettings, exchange
from allocator.searchers.methods.thompson import ThompsonSettings
from allocator.searchers.problem import MethodSettings
from allocator.searchers.settings import SearchSettings
from allocator.searchers.study import CONFIRMED, FINALISTS, Study, run_study
from allocator.testing.spaces import make_uneven_space

EVOLUTION = EvolutionSettings(generations=6, offspring=6, tokens=(64, 128), survivors=(2, 1))
SETTINGS = {
    "evolution": SearchSettings(method="evolution", evolution=EVOLUTION),
    "evolution with training": SearchSettings(method="evolution", evolution=replace(EVOLUTION, training=(32, 256))),
    "auto": SearchSettings(method="auto", tokens=(64, 128)),
    "tpe": SearchSettings(method="tpe", tpe=TpeSettings(trials=20, batch=4, tokens=128)),
    "gp": SearchSettings(method="gp", gp=GpSettings(trials=18, batch=4, tokens=128)),
    "thompson": SearchSettings(method="thompson", thompson=ThompsonSettings(trials=30, batch=4, tokens=128)),
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def test_the_decision_is_replayed_from_the_journal_alone(settings, space, landscape, refusing, tmp_path):
    budget, path = budget_for(space, 0.5), tmp_path / "journal.jsonl"
    study = Study(space=space, budget=budget, settings=settings, seed=3, selection_tokens=256)
    with Journal.create(path, JournalHeader(space=space)) as journal:
        decision = run_study(study, landscape(space), journal)
    written = path.read_bytes()
    with Journal.resume(path) as journal:
        assert run_study(study, refusing, journal) == decision
    assert path.read_bytes() == written


def test_resumed_from_a_torn_journal_it_writes_the_same_journal(settings, space, landscape, tmp_path):
    budget, path = budget_for(space, 0.5), tmp_path / "journal.jsonl"
    study = Study(space=space, budget=budget, settings=settings, seed=3, selection_tokens=256)
    with Journal.create(path, JournalHeader(space=space)) as journal:
        decision = run_study(study, landscape(space), journal)
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for share in (0.0, 0.3, 0.7, 0.99):
        path.write_bytes(whole[: header + int(share * (len(whole) - header))])
        with Journal.resume(path) as journal:
            assert run_study(study, landscape(space), journal) == decision
        assert path.read_bytes() == whole


def test_the_winner_is_the_best_finalist_on_the_selection_split(settings, space, landscape, tmp_path):
    budget = budget_for(space, 0.5)
    phases = []
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=space)) as journal:
        study = Study(space=space, budget=budget, settings=settings, seed=3, selection_tokens=256)
        decision = run_study(study, landscape(space), journal, phase=phases.append)
        selected = [o for o in journal if o.request.split == "selection"]
    assert phases == ["baselines", "search", "selection"]
    assert 1 <= len(selected) <= FINALISTS
    assert {(o.request.tokens, o.request.training) for o in selected} == {(256, settings.training)}
    assert decision.searched == min(selected, key=lambda o: o.loss).request.allocation
    kl = landscape(space).kl
    assert kl(decision.searched) <= min(kl(decision.uniform), kl(decision.two_rate))
    for allocation in (decision.uniform, decision.two_rate, decision.searched):
        assert fits(space, allocation, budget)
        assert denser_moves(space, allocation, budget) == []


@dataclass(frozen=True, kw_only=True)
class CutShort(MethodSettings):
    """Measures starts on all tokens and on few, then exchanges on few, and asks for more than it may spend."""

    tokens = (64, 128)
    exchanges = 20

    @property
    def fidelities(self):
        return self.tokens

    def make(self, problem):
        few, full = self.tokens
        losses = {}

        def script():
            starts = list(problem.start)
            told = yield [Request(allocation=one, tokens=tokens) for tokens in (full, few) for one in starts]
            losses.update({o.request.allocation: o.loss for o in told if o.request.tokens == full})
            best = min(losses, key=losses.get)
            rng = np.random.default_rng(problem.seed)
            drawn = [exchange(problem.space, best, problem.budget, rng, times=2) for _ in range(self.exchanges)]
            yield [Request(allocation=one, tokens=few) for one in dict.fromkeys(drawn) if one not in losses]
            yield [Request(allocation=one, tokens=full) for one in drawn]
            return "never"

        return GeneratorSearcher(script(), lambda: sorted(losses, key=losses.get))


@pytest.mark.parametrize("is_last", [True, False])
def test_a_search_that_is_cut_short_confirms_the_best_that_it_found(is_last, landscape, tmp_path):
    space = make_uneven_space(0, 16, 7)
    budget, path = budget_for(space, 0.5), tmp_path / "journal.jsonl"
    rounds = 1 if is_last else 2
    settings = SearchSettings(budget=f"{30 * rounds} evaluations", rounds=rounds).with_custom(CutShort())
    study = Study(space=space, budget=budget, settings=settings, seed=0, selection_tokens=256)
    with Journal.create(path, JournalHeader(space=space)) as journal:
        decision = run_study(study, landscape(space), journal)
        outcomes = [o for o in journal if o.request.split == "search"]
    assert decision.ended.startswith("the budget of ")
    few, full = ({o.request.allocation: o.loss for o in outcomes if o.request.tokens == t} for t in (64, 128))
    searched = [one for one in few if one not in (decision.uniform, decision.two_rate)]
    start = min((decision.uniform, decision.two_rate), key=full.get)
    better = sorted((one for one in searched if few[one] < few[start]), key=few.get)
    assert len(better) > CONFIRMED
    assert [one for one in searched if one in full] == sorted(better[:CONFIRMED], key=searched.index)
    assert decision.searched in better[:CONFIRMED]
    with Journal.resume(path) as journal:
        assert run_study(study, landscape(space), journal) == decision


@pytest.mark.parametrize("split", ["search", "selection"])
def test_what_cannot_be_measured_is_not_chosen(space, landscape, tmp_path, split):
    """Though it would be best: it fails once, and then another is."""
    budget = budget_for(space, 0.5)

    def decided(name, poison):
        class Ill(landscape):
            def evaluate(self, requests):
                for request in requests:
                    if request.allocation == poison and request.split == split:
                        self.requests.append(request)
                        yield Outcome(request=request, measured={}, wall_s=0.0, failed="3 workers died")
                    else:
                        yield from super().evaluate([request])

        evaluator = Ill(space)
        with Journal.create(tmp_path / name, JournalHeader(space=space)) as journal:
            study = Study(space=space, budget=budget, settings=SETTINGS["evolution"], seed=3, selection_tokens=256)
            decision = run_study(study, evaluator, journal)
        return decision, [r for r in evaluator.requests if r.allocation == poison]

    best, _ = decided("well", None)
    other, asked = decided("ill", best.searched)
    assert other.searched != best.searched
    assert len({request.key for request in asked}) == len(asked) > 0
    assert split == "selection" or {request.split for request in asked} == {"search"}


def test_what_was_measured_before_an_error_is_kept(space, landscape, tmp_path):
    class Breaking(landscape):
        def evaluate(self, requests):
            for number, outcome in enumerate(super().evaluate(requests)):
                if len(self.requests) > 30:
                    raise RuntimeError(f"broken at {number}")
                yield outcome

    budget, path = budget_for(space, 0.5), tmp_path / "journal.jsonl"
    study = Study(space=space, budget=budget, settings=SETTINGS["evolution"], seed=3, selection_tokens=256)
    with Journal.create(path, JournalHeader(space=space)) as journal, pytest.raises(RuntimeError, match="broken"):
        run_study(study, Breaking(space), journal)
    assert len(Journal.read(path)) == 30
