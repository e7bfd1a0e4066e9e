"""``allocator compare`` on tiny models: what is measured, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allocator.commands import compare as comparison
from allocator.core.budget import Budget, denser_moves, fits
from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.evaluation.local import LocalEvaluator
from allocator.searchers.rules.measured import MEASURED_RULES
from allocator.searchers.rules.one_shot import RULES

Cli = Callable[..., Any]


@pytest.fixture
def compare_args(search_args: list[object]) -> list[object]:
    """Arguments of a small comparison."""
    return ["compare", *search_args[1:]]


def serving(pattern: str) -> set[str]:
    """Rules that serve a pattern."""
    return {name for name, rule in {**RULES, **MEASURED_RULES}.items() if pattern in rule.patterns}


@pytest.mark.parametrize("pattern", ["structured", "unstructured", "n:m"])
def test_every_rule_that_serves_is_measured_at_the_budget(
    cli: Cli, compare_args: list[object], here: Path, pattern: str
) -> None:
    answer = cli(*compare_args, "--pattern", pattern, "--json")
    assert answer.code == 0, answer.err
    data = answer.json
    assert set(data["measured"]) == {"dense"} | serving(pattern)
    journal = Journal.read(here / "runs" / "run" / "journal.jsonl")
    space, limit = journal.space, data["budget"]["params"]
    for name, figures in data["measured"].items():
        levels = tuple(data["allocations"][name]["levels"])
        assert figures["params"] == space.cost(levels)
        assert figures["kl"] >= -1e-9
        assert figures["within_budget"]
        if name != "dense":
            assert fits(space, levels, Budget(params=limit))
            assert not denser_moves(space, levels, Budget(params=limit))
    assert data["measured"]["dense"]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert not [path for path in (here / "runs" / "run").iterdir() if path.name.startswith(".")]
    assert json.loads((here / "runs" / "run" / "compare.json").read_text())["measured"] == data["measured"]


def test_figures_are_those_of_a_search_of_the_same_model(cli: Cli, compare_args: list[object], finished: Path) -> None:
    answer = cli(*compare_args, "--name", "two", "--plan", finished / "plan.json", "--json")
    assert answer.code == 0, answer.err
    measured = answer.json["measured"]
    expected = json.loads((finished / "result.json").read_text())["measured"]
    assert list(measured) == ["dense", "plan finished", "uniform"]
    for name, theirs in {"dense": "dense", "uniform": "uniform", "plan finished": "searched"}.items():
        for figure in ("params", "sparsity", "kl", "perplexity"):
            assert measured[name][figure] == expected[theirs][figure]


def test_the_table(cli: Cli, compare_args: list[object], finished: Path) -> None:
    out = cli(*compare_args, "--rule", "owl", "--rule", "shortgpt", "--plan", finished / "plan.json").out
    for word in ("owl", "shortgpt", "uniform", "plan finished", "vs uniform", "perplexity", "compare.json"):
        assert word in out


def test_a_plan_above_the_budget_is_marked(cli: Cli, compare_args: list[object], finished: Path) -> None:
    arguments = [*compare_args, "--target", 0.8, "--plan", finished / "plan.json"]
    out = cli(*arguments).out
    assert "plan finished *" in out
    assert "*: above the budget of" in out
    data = cli(*arguments, "--resume", "--json").json
    assert not data["measured"]["plan finished"]["within_budget"]
    assert data["measured"]["uniform"]["within_budget"]


def test_a_plan_with_other_ladders(cli: Cli, compare_args: list[object], finished: Path) -> None:
    """Its own space is executed: the same figures as on the ladders that it was made with."""
    expected = json.loads((finished / "result.json").read_text())["measured"]["searched"]
    ladder = ["--set", "ladder.sparsities=[0.25,0.5,0.75,1.0]"]
    data = cli(*compare_args, *ladder, "--plan", finished / "plan.json", "--json").json
    found = data["measured"]["plan finished"]
    assert (found["params"], found["kl"]) == (expected["params"], expected["kl"])


def test_what_is_added_to_a_comparison_is_all_that_is_measured(
    cli: Cli, compare_args: list[object], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli(*compare_args, "--rule", "owl", "--rule", "atp", "--json").json
    journal = (here / "runs" / "run" / "journal.jsonl").read_bytes()
    executed = []
    execute = LocalEvaluator.execute

    def count(self: LocalEvaluator, executions: Any, tokens: int) -> Any:
        executed.extend(executions)
        return execute(self, executions, tokens)

    monkeypatch.setattr(LocalEvaluator, "execute", count)
    again = cli("compare", "--resume", "--name", "run", "--rule", "owl", "--rule", "atp", "--json").json
    assert executed == []
    assert again["measured"] == first["measured"]
    assert (here / "runs" / "run" / "journal.jsonl").read_bytes() == journal
    more = cli("compare", "--resume", "--name", "run", "--rule", "shortgpt", "--json").json
    assert len(executed) == 1
    assert set(more["measured"]) == {"dense", "uniform", "owl", "atp", "shortgpt"}


def test_stopped_at_any_point_it_goes_on(
    cli: Cli, compare_args: list[object], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [part for name in ("finercut", "flap", "two_rate") for part in ("--rule", name)]
    whole = cli(*compare_args, "--name", "whole", *rules, "--json").json
    evaluate, execute = LocalEvaluator.evaluate, LocalEvaluator.execute
    left = [4]

    def stopping(method: Any) -> Any:
        def run(self: LocalEvaluator, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return method(self, *arguments)

        return run

    monkeypatch.setattr(LocalEvaluator, "evaluate", stopping(evaluate))
    monkeypatch.setattr(LocalEvaluator, "execute", stopping(execute))
    answer = cli(*compare_args, *rules, "--json")
    stops = 0
    while answer.code == 130:
        stops += 1
        assert "allocator compare --resume --name run --rule finercut --rule flap --rule two_rate" in answer.err
        left[0] = 4
        answer = cli("compare", "--resume", "--name", "run", *rules, "--json")
    assert stops >= 2
    assert answer.json["measured"] == whole["measured"]
    journals = [Journal.read(here / "runs" / name / "journal.jsonl") for name in ("whole", "run")]
    assert [o.request for o in journals[0]] == [o.request for o in journals[1]]


def test_a_closed_rule_needs_no_level_store(cli: Cli, compare_args: list[object], here: Path) -> None:
    assert cli(*compare_args, "--rule", "owl").code == 0
    assert {path.name for path in (here / "runs" / "run").iterdir()} == {
        "compare.json",
        "journal.jsonl",
        "run.yaml",
        "signals.npz",
        "status.json",
    }


def test_the_default_name_is_not_that_of_a_search(tiny_model: Path) -> None:
    config = comparison.build_comparison_config(tiny_model, None, {}, resume=False)
    assert config.run_name.endswith("-structured-0.5-seed0-compare")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rule", "flap", "--pattern", "unstructured"], ["flap does not serve unstructured", "these do:", "lamp"]),
        (["--rule", "lamp"], ["lamp does not serve structured", "these do:", "flap"]),
        (["--rule", "owll"], ["unknown rule 'owll'", "owl", "Known: uniform"]),
        (["--plan", "nowhere.json"], ["nowhere.json", "no such plan"]),
        (["--resume"], ["no such run"]),
    ],
)
def test_refusals(
    refused: Callable[..., str], compare_args: list[object], arguments: list[str], words: list[str]
) -> None:
    message = refused(*compare_args, *arguments)
    assert all(word in message for word in words), message


def test_plans_that_do_not_belong_are_refused(
    refused: Callable[..., str], compare_args: list[object], own_run: Path, tiny_qwen2: Path
) -> None:
    plan, new = own_run / "plan.json", ["--name", "new"]
    assert "--pattern structured" in refused(*compare_args, *new, "--plan", plan, "--pattern", "unstructured")
    assert "another model" in refused(*compare_args, *new, "--plan", plan, "--model", tiny_qwen2)
    heads = ["--set", "ladder.attention=query_heads"]
    assert "the plan's units differ" in refused(*compare_args, *new, "--plan", plan, *heads)
    assert "two plans are called" in refused(*compare_args, *new, "--plan", plan, "--plan", plan)
    assembled = ["--set", "ladder.sparsities=[0.5,1.0]", "--set", "pruner.execution=assemble"]
    assert "the plan's ladders differ" in refused(*compare_args, *new, "--plan", plan, *assembled)
    assert "holds a search" in refused(*compare_args, "--resume")


def test_from_python(tiny_model: Path, text_folder: Path, tmp_path: Path, sets: list[str], finished: Path) -> None:
    import allocator

    where = {"runs_dir": tmp_path, "name": "own", "text": text_folder, "workers": 0, "settings": sets[1::2]}
    data = allocator.compare(tiny_model, rules=["cfsp"], plans=[finished / "plan.json"], **where)
    assert set(data.measured) == {"dense", "uniform", "cfsp", "plan finished"}
    with pytest.raises(UserError, match="exists already"):
        allocator.compare(tiny_model, rules=["cfsp"], **where)
    shutil.copy(finished / "plan.json", tmp_path / "mine.json")
    more = allocator.compare(tiny_model, plans=[tmp_path / "mine.json"], resume=True, **where)
    assert more.measured["plan mine"] == more.measured["plan finished"]
    assert Plan.load(tmp_path / "mine.json").allocation == tuple(more.data["allocations"]["plan mine"]["levels"])
