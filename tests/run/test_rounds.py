"""A search in rounds, end to end: finer ladders, the same plan whatever happens, and commands that work on it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from forked import Command
from hypothesis import given
from hypothesis import strategies as st

import allocator
from allocator.cli import main
from allocator.core.budget import budget_for, denser_moves
from allocator.core.errors import UserError
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.model.family.space import build_space
from allocator.run import directory as folder
from allocator.run.config.load import load_config
from allocator.run.config.run import RunConfig
from allocator.run.model import read_model
from allocator.run.reporting import Silent
from allocator.searchers.coarse_to_fine import refine_ladders, translate
from allocator.searchers.study import Study, run_study

SETTINGS = {
    "search.rounds": 2,
    "search.method": "evolution",
    "search.evolution.generations": 3,
    "search.evolution.offspring": 4,
    "search.evolution.tokens": [128, 256],
    "search.evolution.survivors": [2, 1],
    "tokens.sequence_length": 64,
    "tokens.calibration": 512,
    "tokens.selection": 256,
    "tokens.test": 512,
}
PATTERNS: dict[str, dict[str, Any]] = {"structured": {}, "unstructured": {"pruner.inputs": "path"}}
DEADLINE_S = 180.0

Search = Callable[..., Any]


@pytest.fixture(scope="session")
def search(tiny_model: Path, text_folder: Path) -> Search:
    """Searches the tiny model."""

    def run(runs_dir: Path, *, more: dict[str, Any] | None = None, **flags: Any) -> Any:
        settings = [f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, **(more or {})}.items()]
        flags = {"workers": 0, "name": "run", **flags}
        return allocator.search(tiny_model, text=text_folder, runs_dir=runs_dir, settings=settings, **flags)

    return run


@pytest.fixture(scope="session")
def finished(search: Search, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted searches of two rounds in one process: dense then expected inputs; along paths. Read only."""
    return {
        pattern: search(tmp_path_factory.mktemp(pattern), pattern=pattern, more=more)
        for pattern, more in PATTERNS.items()
    }


@pytest.fixture
def own_run(finished: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the structured run, without what its end has made."""
    folder = Path(shutil.copytree(finished["structured"].folder, tmp_path / "run"))
    for name in ("plan.json", "result.json", "report.html"):
        (folder / name).unlink()
    for name in ("checkpoint", "figures"):
        shutil.rmtree(folder / name)
    return folder


def same(folder: Path, reference: Path) -> None:
    """Everything that does not tell of time is the same, and nothing lies about."""
    for name in ("plan.json", "front.json", "rounds/1/front.json"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    for name in ("journal.jsonl", "rounds/1/journal.jsonl"):
        own, other = (Journal.read(place / name) for place in (folder, reference))
        assert {o.request.key: o.measured for o in own} == {o.request.key: o.measured for o in other}
        assert own.header == other.header
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


# --- ladders of a real model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "structured"},
        {"pattern": "structured", "ladder": {"align": 5}},
        {"pattern": "structured", "ladder": {"attention": "query_heads"}, "pruner": {"bias": True}},
        {"pattern": "unstructured"},
    ],
    ids=["structured", "aligned", "query heads and biases", "unstructured"],
)
@given(data=st.data())
def test_finer_levels_cost_what_they_cost_in_any_ladder(tiny_model: Path, settings: dict[str, Any], data: Any) -> None:
    config = RunConfig(model=str(tiny_model), **settings)
    checkpoint, layout, space = read_model(config)
    levels = st.tuples(*(st.integers(0, unit.num_levels - 1) for unit in space.units))
    incumbent, other = data.draw(levels), data.draw(levels)

    def build(ladder: Any) -> Any:
        pattern, align, bias = config.pattern, config.ladder.align, config.pruner.bias
        return build_space(layout, checkpoint, pattern, config.target, ladder, align, bias=bias)

    finer = build(refine_ladders(space, incumbent, [other]))
    for allocation in (incumbent, other):
        again = translate(allocation, space, finer)
        assert [finer.cost(again, cost) for cost in ("params", "macs")] == [
            space.cost(allocation, cost) for cost in ("params", "macs")
        ]
        assert all(
            u.kept[level] == v.kept[b]
            for u, level, v, b in zip(finer.units, again, space.units, allocation, strict=True)
        )
    everything = build([step / 480 for step in range(1, 481)])
    for unit, full in zip(finer.units, everything.units, strict=True):
        costs = dict(zip(full.kept, zip(full.params, full.macs, strict=True), strict=True))
        assert [(p, m) for p, m in zip(unit.params, unit.macs, strict=True)] == [costs[count] for count in unit.kept]
        assert not any(count % config.ladder.align for count in unit.kept[1:] if unit.kind == "channels")


# --- what a run of two rounds is ------------------------------------------------------------------------------


class NoModel:
    """Whoever asks for a measurement that the journal lacks is not replaying."""

    def evaluate(self, requests: Any) -> Iterator[Any]:
        raise AssertionError(f"not in the journal: {requests[0]}")
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_second_round_begins_where_the_first_ended(finished: dict[str, Any], pattern: str) -> None:
    result = finished[pattern]
    first, second = (Journal.read(result.folder / name) for name in ("rounds/1/journal.jsonl", "journal.jsonl"))
    config = load_config(result.folder / "run.yaml")
    budget = budget_for(first.space, config.target)
    study = Study(space=first.space, budget=budget, settings=config.search, seed=config.seed, selection_tokens=256)
    decision = run_study(study, NoModel(), first)
    begun = second.header.round
    named = {"incumbent": decision.searched, "uniform": decision.uniform, "two_rate": decision.two_rate}
    for name, allocation in named.items():
        before = [unit.kept[level] for unit, level in zip(first.space.units, allocation, strict=True)]
        after = [unit.kept[level] for unit, level in zip(second.space.units, begun[name], strict=True)]
        assert after == before or (name == "incumbent" and all(a >= b for a, b in zip(after, before, strict=True)))
    assert denser_moves(second.space, begun["incumbent"], budget) == []
    inputs = {"inputs": "path", "along": begun["incumbent"]} if PATTERNS[pattern] else {"inputs": "expected"}
    assert second.header.pruner == {**first.header.pruner, **inputs}
    assert begun["earlier"] == result.summary["search"]["rounds"][:1]
    for before, after in zip(first.space.units, second.space.units, strict=True):
        assert (after.kept[0], after.kept[-1]) == (before.kept[0], before.kept[-1])
        if before.kind != "kv_groups":
            assert min(a - b for a, b in pairwise(after.kept)) < min(a - b for a, b in pairwise(before.kept))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_plan_is_exact_and_no_worse_than_the_incumbent(finished: dict[str, Any], pattern: str) -> None:
    result = finished[pattern]
    plan = Plan.load(result.folder / "plan.json")
    assert plan.space == Journal.read(result.folder / "journal.jsonl").space
    assert denser_moves(plan.space, plan.allocation, plan.budget) == []
    search, measured = result.summary["search"], result.summary["measured"]
    assert search["losses"]["selection"] <= search["losses"]["incumbent"]
    for name in ("uniform", "two_rate", "searched"):
        assert measured[name]["params"] <= plan.budget.limits["params"]
    assert measured["searched"]["params"] == plan.space.cost(plan.allocation)
    assert search["evaluations"] == sum(line["evaluations"] for line in search["rounds"])
    assert search["candidate_tokens"] == sum(line["candidate_tokens"] for line in search["rounds"])
    assert search["store_tokens"] == 2 * SETTINGS["tokens.calibration"]


def test_uniform_is_that_of_a_search_in_one_round(finished: dict[str, Any], search: Search, tmp_path: Path) -> None:
    once = search(tmp_path, more={"search.rounds": 1}).summary["measured"]
    twice = finished["structured"].summary["measured"]
    for name in ("dense", "uniform", "two_rate"):
        assert once[name] == twice[name]


# --- same seed, same plan -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
def test_same_plan_with_workers(search: Search, finished: dict[str, Any], tmp_path: Path) -> None:
    same(search(tmp_path, workers=2).folder, finished["structured"].folder)


class Stopping(Silent):
    """Presses Ctrl-C where it was not pressed before, a little later in a phase each time."""

    def __init__(self, pressed: list[tuple[str, int]]) -> None:
        self._pressed, self._at = pressed, ("", 0)

    def start_phase(self, name: str, total: int | None = None) -> None:
        self._at = (name, 0)
        self._press()

    def advance(self, done: int, note: str = "") -> None:
        self._at = (self._at[0], self._at[1] + 1)
        self._press()

    def _press(self) -> None:
        name, step = self._at
        if name != "checking" and step % 2 == 0 and self._at not in self._pressed:
            self._pressed.append(self._at)
            raise KeyboardInterrupt


def test_stopped_again_and_again_in_every_phase_and_resumed(
    search: Search, finished: dict[str, Any], tmp_path: Path
) -> None:
    pressed: list[tuple[str, int]] = []
    while not (tmp_path / "run" / "plan.json").exists():
        with contextlib.suppress(KeyboardInterrupt):
            search(tmp_path, resume=bool(pressed), reporter=Stopping(pressed))
    phases = [f"{name} {number}/2" for number in (1, 2) for name in ("level store", "baselines", "search")]
    assert {name for name, _ in pressed} == {*phases, "selection 2/2", "executing"}
    assert {("level store 2/2", 2), ("search 2/2", 4)} <= {*pressed}
    same(tmp_path / "run", finished["structured"].folder)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_killed_in_the_second_round_and_resumed(
    search: Search, finished: dict[str, Any], tiny_model: Path, text_folder: Path, tmp_path: Path, share: float
) -> None:
    reference = finished["structured"].folder
    lines = int(share * len(Journal.read(reference / "journal.jsonl")))
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    flags = ["--model", tiny_model, "--text", text_folder, "--name", "run", "--runs-dir", tmp_path, "--workers", 0]
    process = Command(["search", *flags, *sets])
    journal, end = tmp_path / "run" / "journal.jsonl", time.monotonic() + DEADLINE_S
    try:
        while not (tmp_path / "run" / "rounds" / "1").exists() or journal.read_bytes().count(b"\n") <= lines:
            assert process.poll() is None, "over before it was killed"
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "run" / "plan.json").exists()
    same(search(tmp_path, resume=True).folder, reference)


def test_between_rounds_a_second_driver_is_refused_all_the_while(
    search: Search, own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = own_run / "journal.jsonl"
    header = journal.read_bytes().splitlines(keepends=True)[0]
    shutil.rmtree(own_run / "levels")
    shutil.move(own_run / "rounds" / "1" / "journal.jsonl", journal)
    refused: list[str] = []

    def refusing(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            with pytest.raises(UserError, match="another process is writing this run"):
                Journal.resume(journal)
            refused.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in ((folder, "write_atomic"), (Journal, "create"), (shutil, "rmtree")):
        refusing(owner, name)
    search(own_run.parent, resume=True)
    assert refused[-1] == "rmtree"
    assert {*refused} == {"write_atomic", "create", "rmtree"}
    assert journal.read_bytes().splitlines(keepends=True)[0] == header


@pytest.mark.parametrize("begun", [False, True])
def test_killed_between_rounds_and_resumed(
    search: Search, finished: dict[str, Any], own_run: Path, begun: bool
) -> None:
    """As a kill leaves the folder before and after the second round's journal takes the place of the first's."""
    (own_run / "levels").rename(own_run / ".levels.outdated")
    (own_run / "front.json").unlink()
    journal = own_run / "journal.jsonl"
    header = journal.read_bytes().splitlines(keepends=True)[0]
    if begun:
        journal.write_bytes(header)
    else:
        (own_run / ".journal.next").write_bytes(header)
        shutil.copy(own_run / "rounds" / "1" / "journal.jsonl", journal)
    same(search(own_run.parent, resume=True).folder, finished["structured"].folder)


def test_stores_at_a_named_place(search: Search, finished: dict[str, Any], tmp_path: Path) -> None:
    """Each has a name of its own, stays, and serves the same round of another run; one round takes the place itself."""
    result = search(tmp_path, name="one", more={"store": str(tmp_path / "store")})
    again = search(tmp_path, name="two", more={"store": str(tmp_path / "store")})
    assert not (result.folder / "levels").exists()
    stores = [path.name for path in tmp_path.iterdir() if path.name.startswith("store")]
    assert len(stores) == 2
    assert all(name.startswith("store-") for name in stores)
    search(tmp_path, name="once", more={"store": str(tmp_path / "store"), "search.rounds": 1})
    assert (tmp_path / "store").is_dir()
    reference = (finished["structured"].folder / "plan.json").read_bytes()
    assert (result.folder / "plan.json").read_bytes() == (again.folder / "plan.json").read_bytes() == reference


# --- commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_plan_is_executed_to_the_same_weights(
    finished: dict[str, Any], tiny_model: Path, text_folder: Path, tmp_path: Path, pattern: str
) -> None:
    folder = finished[pattern].folder
    plan = Plan.load(folder / "plan.json")
    counted = allocator.prune(plan, tmp_path / "out", model=tiny_model, text=text_folder)
    assert counted == plan.space.cost(plan.allocation)
    weights = [place / "model.safetensors" for place in (tmp_path / "out", folder / "checkpoint")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    figures = allocator.evaluate(tmp_path / "out", model=tiny_model, text=text_folder, tokens=512, length=64)
    assert figures["kl"] == pytest.approx(plan.measured["searched"]["kl"], rel=1e-9)


def test_assembled_from_the_store_and_afresh(
    finished: dict[str, Any], tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    """The last round's store is that of the plan, and is made again from the plan alone."""
    folder = finished["structured"].folder
    options = {"model": tiny_model, "execution": "assemble", "text": text_folder}
    allocator.prune(folder / "plan.json", tmp_path / "stored", store=folder / "levels", **options)
    allocator.prune(folder / "plan.json", tmp_path / "afresh", **options)
    weights = [tmp_path / name / "model.safetensors" for name in ("stored", "afresh")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_front_plan_and_report(
    finished: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished["structured"].folder, tmp_path / "run"))

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["allocator", *map(str, arguments)])
        capfd.readouterr()
        with contextlib.suppress(SystemExit):
            main()
        return capfd.readouterr().out

    assert json.loads(command("front", folder, "--json"))["points"]
    assert json.loads(command("front", folder / "rounds" / "1", "--json"))["points"]
    assert json.loads(command("plan", folder, "--json")) == json.loads((folder / "plan.json").read_text())
    chosen = json.loads(command("plan", folder, "--target", 0.4, "--out", tmp_path / "plan.json", "--json"))
    assert chosen["sparsity"] >= 0.4
    assert Plan.load(tmp_path / "plan.json").to_json() == chosen
    command("report", folder)
    page = (folder / "report.html").read_text()
    assert "<h3>Rounds</h3>" in page
    assert f"{finished['structured'].summary['search']['candidate_tokens']:,}" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "n:m", "more": {}}, r"search\.rounds: .* 2:4, 1:4.*--pattern unstructured"),
        ({"more": {"search.rounds": 0}}, r"search\.rounds: expected at least 1, found 0"),
    ],
)
def test_rounds_that_make_no_sense_are_refused(
    search: Search, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(allocator.UserError, match=message):
        search(tmp_path, **settings)
    assert not list(tmp_path.iterdir())
