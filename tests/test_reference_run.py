"""The committed reference run is what its journal says, and the README cites it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from allocator.core.budget import denser_moves
from allocator.core.files import read_json
from allocator.core.journal import Journal
from allocator.core.outcomes import build_front
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome, Request
from allocator.report.marks import restore_allocations
from allocator.run.config.load import load_config
from allocator.searchers.coarse_to_fine import Round
from allocator.searchers.study import Study, run_study

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "runs" / "reference"


class NoModel:
    """Whoever asks for a measurement that the journal lacks is not replaying."""

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        raise AssertionError(f"not in the journal: {requests[0]}")
        yield


@pytest.fixture(scope="module")
def journal() -> Journal:
    return Journal.read(REFERENCE / "journal.jsonl")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.load(REFERENCE / "plan.json")


def test_replaying_the_journal_gives_the_plan(journal: Journal, plan: Plan) -> None:
    config = load_config(REFERENCE / "run.yaml")
    study = Study(
        space=plan.space,
        budget=plan.budget,
        settings=config.search,
        seed=config.seed,
        selection_tokens=config.tokens.selection,
        round=Round.from_json(journal.header.round),
    )
    decision = run_study(study, NoModel(), journal)
    assert decision.searched == plan.allocation
    recorded = restore_allocations(plan.space, read_json(REFERENCE / "result.json", "result")["units"])
    assert recorded == {"uniform": decision.uniform, "two_rate": decision.two_rate, "searched": decision.searched}


def test_front_is_the_journal_s(journal: Journal) -> None:
    assert read_json(REFERENCE / "front.json", "front") == build_front(journal)


def test_plan_is_within_its_budget_and_full(plan: Plan) -> None:
    assert plan.measured["searched"]["params"] == plan.space.cost(plan.allocation) <= plan.budget.limits["params"]
    assert denser_moves(plan.space, plan.allocation, plan.budget) == []


def test_readme_cites_its_figures(plan: Plan) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("dense", "uniform", "two_rate", "searched"):
        figures = plan.measured[name]
        row = f"{figures['params']:,} | {figures['perplexity']:.2f} | {figures['kl']:.4f}"
        assert row in readme
