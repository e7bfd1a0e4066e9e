"""The main job, end to end: same plan whatever happens, and a checkpoint that is what the plan says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Command, Python, without_cluster
from safetensors.numpy import load_file

import allocator
from allocator.core.budget import Budget
from allocator.core.plan import Plan
from allocator.run.reporting import Silent

SETTINGS = {
    "tokens.sequence_length": 64,
    "tokens.calibration": 512,
    "tokens.selection": 256,
    "tokens.test": 512,
    "search.method": "evolution",
    "search.evolution.generations": 8,
    "search.evolution.offspring": 6,
    "search.evolution.tokens": [128, 256],
    "search.evolution.survivors": [2, 1],
}
SHORT = {**SETTINGS, "search.evolution.generations": 1}
TRAINED = {
    **SETTINGS,
    "search.evolution.generations": 2,
    "search.evolution.training": [64, 256],
    "training.learning_rate": 1e-3,
}
LONG = {**SETTINGS, "search.evolution.generations": 60, "search.evolution.patience": 60}
PATTERNS = ("structured", "unstructured")
DEADLINE_S = 180.0

Search = Callable[..., Any]


# --- helpers --------------------------------------------------------------------------------------------------


def assignments(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def until(condition: Callable[[], object], what: str, pause_s: float = 0.002) -> None:
    """Poll until a condition holds; pause longer where looking is dear."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE_S} s for {what}"
        time.sleep(pause_s)


def processes() -> dict[int, tuple[int, int, str]]:
    """Parent, session and title of every process that is not a zombie."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state != "Z":
            found[int(folder.name)] = (int(parent), int(session), title)
    return found


def in_session(session: int) -> list[str]:
    return [title for _, own, title in processes().values() if own == session]


def workers_of(pid: int, title: str = "ray::Worker") -> list[int]:
    """Ray workers below a process whose title begins so."""
    alive = processes()

    def below(child: int) -> bool:
        while child in alive and child != pid:
            child = alive[child][0]
        return child == pid

    return [child for child, (_, _, own) in alive.items() if own.startswith(title) and below(child)]


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def measured_keys(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()[1:]]
    return [(tuple(line["allocation"]), line["split"], line["tokens"]) for line in lines]


class Driver:
    """A search as a user starts it, in a session of its own, so that all its processes can be found."""

    def __init__(self, arguments: list[object], folder: Path) -> None:
        environment = without_cluster()
        self.process = Command(arguments, folder, environment)

    @property
    def session(self) -> int:
        return self.process.pid

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        until(lambda: condition() or self.process.poll() is not None, what)
        assert self.process.poll() is None, f"over before {what}: {self.process.communicate()[1]}"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL, "over before it was killed"

    def finish(self) -> str:
        error = self.process.communicate(timeout=DEADLINE_S)[1]
        assert "Traceback" not in error, error
        return error

    def clean(self) -> None:
        for pid, (_, session, _) in processes().items():
            if session == self.session:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def drive() -> Iterator[Callable[[list[object], Path], Driver]]:
    """Starts drivers, and leaves none behind."""
    drivers: list[Driver] = []

    def start(arguments: list[object], folder: Path) -> Driver:
        drivers.append(Driver(arguments, folder))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.clean()


@pytest.fixture(scope="session")
def run_search(tiny_model: Path, text_folder: Path) -> Search:
    """Searches the tiny model."""

    def run(runs_dir: Path, *, model: Path = tiny_model, settings: Mapping[str, Any] = SETTINGS, **more: Any) -> Any:
        more = {"workers": 0, "name": "run", **more}
        return allocator.search(model, text=text_folder, runs_dir=runs_dir, settings=assignments(settings), **more)

    return run


@pytest.fixture(scope="session")
def finished(run_search: Search, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted search in one process, for each pattern. Read only."""
    return {pattern: run_search(tmp_path_factory.mktemp(pattern), pattern=pattern) for pattern in PATTERNS}


@pytest.fixture(scope="session")
def finished_long(run_search: Search, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A search long enough to be interrupted, in one process, uninterrupted. Read only."""
    return run_search(tmp_path_factory.mktemp("long"), settings=LONG)


def plan_bytes(run: Path) -> bytes:
    return (run / "plan.json").read_bytes()


# --- same seed, same plan -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("pattern", ["structured", pytest.param("unstructured", marks=pytest.mark.slow)])
def test_same_plan_with_two_workers(run_search: Search, finished: dict[str, Any], tmp_path: Path, pattern: str) -> None:
    result = run_search(tmp_path, pattern=pattern, workers=2)
    assert plan_bytes(result.folder) == plan_bytes(finished[pattern].folder)
    assert sorted(measured_keys(result.folder)) == sorted(measured_keys(finished[pattern].folder))


@pytest.mark.usefixtures("cluster")
def test_same_plan_for_relative_paths_and_a_worker_elsewhere(
    run_search: Search,
    finished: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cluster was started in another folder, as a cluster that many people use always was."""
    (tmp_path / tiny_model.name).symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    result = run_search(Path("runs"), model=Path(tiny_model.name), workers=1, settings={**SETTINGS, "store": "store"})
    assert plan_bytes(result.folder) == plan_bytes(finished["structured"].folder)
    assert sorted(measured_keys(result.folder)) == sorted(measured_keys(finished["structured"].folder))


def test_another_seed_is_another_search(run_search: Search, finished: dict[str, Any], tmp_path: Path) -> None:
    result = run_search(tmp_path, seed=1)
    assert measured_keys(result.folder) != measured_keys(finished["structured"].folder)


# --- kills ----------------------------------------------------------------------------------------------------


@pytest.fixture
def search_arguments(tiny_model: Path, text_folder: Path) -> list[object]:
    sets = [part for assignment in assignments(LONG) for part in ("--set", assignment)]
    return ["search", "--model", tiny_model, "--text", text_folder, "--name", "run", *sets]


def test_killed_at_any_moment_and_resumed(
    drive: Callable[..., Driver], search_arguments: list[object], finished_long: Any, tmp_path: Path
) -> None:
    """kill -9 while the store is built, at five moments of the search, and while the plan is executed."""
    run, reference = tmp_path / "runs" / "run", finished_long.folder
    journal, total = run / "journal.jsonl", num_lines(reference / "journal.jsonl")
    arguments = [*search_arguments, "--workers", 0]
    for _ in range(5):
        driver = drive(arguments, tmp_path)
        driver.wait_for(lambda: list(run.glob(".levels.*/*.safetensors")), "the level store")
        driver.kill()
        if not (run / "levels").exists():
            break
        for path in sorted(run.rglob("*"), reverse=True):  # too late: once more from the start
            path.rmdir() if path.is_dir() else path.unlink()
        run.rmdir()
    assert list(run.glob(".levels.*/*.safetensors"))
    assert not (run / "levels").exists()
    for moment in sorted(random.Random(0).sample(range(1, int(0.8 * total)), 5)):
        aim = max(moment, num_lines(journal) + 1)
        driver = drive([*arguments, "--resume"], tmp_path)
        driver.wait_for(lambda aim=aim: num_lines(journal) >= aim, f"{aim} of {total} lines")
        driver.kill()
        assert aim <= num_lines(journal) < total
        assert not (run / "plan.json").exists()
    driver = drive([*arguments, "--resume"], tmp_path)
    driver.wait_for(lambda: list(run.glob(".executing-*/*")), "the execution")
    driver.kill()
    assert list(run.glob(".executing-*"))
    assert not (run / "plan.json").exists()
    resumed = drive([*arguments, "--resume"], tmp_path)
    assert "resuming" in resumed.finish()
    assert resumed.process.returncode == 0
    assert plan_bytes(run) == plan_bytes(reference)
    assert (run / "front.json").read_bytes() == (reference / "front.json").read_bytes()
    assert measured_keys(run) == measured_keys(reference)
    assert not list(run.glob(".*"))
    assert {path.name for path in run.iterdir()} == {path.name for path in reference.iterdir()}


def test_interrupted_and_killed_with_workers(
    drive: Callable[..., Driver],
    search_arguments: list[object],
    finished_long: Any,
    run_search: Search,
    tmp_path: Path,
) -> None:
    """Ctrl-C says how to resume, and leaves no process behind; kill -9 resumes too (Ray itself ends a minute later)."""
    run, reference = tmp_path / "runs" / "run", finished_long.folder
    journal, total = run / "journal.jsonl", num_lines(reference / "journal.jsonl")
    driver = drive([*search_arguments, "--workers", 2], tmp_path)
    driver.wait_for(lambda: num_lines(journal) >= total // 4, "a quarter of the search")
    os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    error = driver.finish()
    assert driver.process.returncode == 130, error
    assert "nothing measured is lost" in error
    until(lambda: not in_session(driver.session), "the processes of the cluster to end", 0.1)
    assert total // 4 <= num_lines(journal) < total

    command = next(line for line in error.splitlines() if line.strip().startswith("allocator search --resume"))
    aim = num_lines(journal) + total // 4
    driver = drive(shlex.split(command)[1:], tmp_path)
    driver.wait_for(lambda: num_lines(journal) >= aim, "more of the search")
    driver.kill()
    driver.clean()
    assert not (run / "plan.json").exists()

    result = run_search(tmp_path / "runs", resume=True, settings=LONG)
    assert plan_bytes(result.folder) == plan_bytes(reference)
    assert sorted(measured_keys(run)) == sorted(measured_keys(reference))


class Killer(Silent):
    """Kills one idle worker after the fifth batch, and one in the middle of its work after the tenth."""

    def __init__(self) -> None:
        self.steps, self.said, self.killed = 0, list[str](), list[int]()
        self._search = False

    def start_phase(self, name: str, total: int | None = None) -> None:
        self._search = name == "search"

    def advance(self, done: int, note: str = "") -> None:
        self.steps += self._search
        if self._search and self.steps == 5:
            self._kill("ray::Worker")
        if self._search and self.steps == 10:
            threading.Thread(target=self._kill, args=("ray::Worker.measure",), daemon=True).start()

    def notify(self, message: str) -> None:
        self.said.append(message)

    def _kill(self, title: str) -> None:
        victims: list[int] = []
        until(lambda: victims.extend(workers_of(os.getpid(), title)) or victims, title)
        os.kill(victims[0], signal.SIGKILL)
        self.killed.append(victims[0])


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_costs_nothing_but_time(run_search: Search, finished_long: Any, tmp_path: Path) -> None:
    killer = Killer()
    result = run_search(tmp_path, workers=2, reporter=killer, settings=LONG)
    assert len(killer.killed) == 2
    assert sum("a worker died and is replaced" in message for message in killer.said) >= 2
    assert plan_bytes(result.folder) == plan_bytes(finished_long.folder)
    assert sorted(measured_keys(result.folder)) == sorted(measured_keys(finished_long.folder))
    until(lambda: not workers_of(os.getpid()), "the workers to end", 0.1)


# --- searches that train their candidates ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_trained(run_search: Search, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A search whose candidates are trained, in one process, uninterrupted. Read only."""
    return run_search(tmp_path_factory.mktemp("trained"), settings=TRAINED)


def test_a_search_says_what_training_changed(finished_trained: Any, finished: dict[str, Any]) -> None:
    summary, plan = finished_trained.summary, finished_trained.plan
    lines = {(line["split"], line["tokens"]): line for line in summary["search"]["training"]}
    assert [(key, line["training"]) for key, line in lines.items()] == [
        (("search", 256), 256),
        (("search", 128), 64),
        (("selection", 256), 256),
    ]
    assert all(line["before"] != line["after"] for line in lines.values())
    assert -1.0 <= lines["search", 128]["rank_correlation"] <= 1.0
    assert plan.provenance["training"] == {"tokens": [64, 256], "learning_rate": 1e-3, "batch_sequences": 1}
    assert "training" not in finished["structured"].plan.provenance
    measured = summary["measured"]
    assert set(measured) - set(finished["structured"].summary["measured"]) == {"uniform_trained", "searched_trained"}
    assert measured["searched_trained"]["params"] == measured["searched"]["params"]
    assert summary["tokens"]["training"] == 256
    kept = {path.name for path in finished_trained.folder.iterdir()}
    assert kept == {path.name for path in finished["structured"].folder.iterdir()}
    assert "Effect of training" in (finished_trained.folder / "report.html").read_text()
    chosen = allocator.open_run(finished_trained.folder).plan(0.5)
    assert chosen.provenance["training"] == plan.provenance["training"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_same_plan_for_any_number_of_workers_that_train(
    run_search: Search, finished_trained: Any, tmp_path: Path, workers: int
) -> None:
    result = run_search(tmp_path, workers=workers, settings=TRAINED)
    assert plan_bytes(result.folder) == plan_bytes(finished_trained.folder)
    assert result.summary["search"] == finished_trained.summary["search"]
    assert not (result.folder / "training").exists()


@pytest.mark.slow
def test_killed_while_it_trains_and_resumed(
    drive: Callable[..., Driver], finished_trained: Any, tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    """kill -9 three times, with states to go on from; the last time those are lost as well."""
    run, reference = tmp_path / "runs" / "run", finished_trained.folder
    journal, total = run / "journal.jsonl", num_lines(reference / "journal.jsonl")
    sets = [part for assignment in assignments(TRAINED) for part in ("--set", assignment)]
    arguments = ["search", "--model", tiny_model, "--text", text_folder, "--name", "run", *sets, "--workers", 0]
    for resume in ([], ["--resume"], ["--resume"]):
        aim = num_lines(journal) + 2
        driver = drive([*arguments, *resume], tmp_path)
        driver.wait_for(
            lambda aim=aim: num_lines(journal) >= aim and list((run / "training").glob("*.safetensors")), "training"
        )
        driver.kill()
        assert num_lines(journal) < total
    for path in (run / "training").iterdir():
        path.unlink()
    resumed = drive([*arguments, "--resume"], tmp_path)
    assert "resuming" in resumed.finish()
    assert plan_bytes(run) == plan_bytes(reference)
    assert measured_keys(run) == measured_keys(reference)
    assert {path.name for path in run.iterdir()} == {path.name for path in reference.iterdir()}


# --- the budget, counted in the saved checkpoint --------------------------------------------------------------


def in_unit(name: str) -> bool:
    return ".self_attn." in name or ".mlp." in name


def unit_of(tensor: str, pattern: str) -> str:
    module = tensor.rpartition(".")[0]
    return module if pattern == "unstructured" else module.rpartition(".")[0]


@pytest.mark.parametrize(
    ("kind", "target", "pattern"),
    [  # every target and pattern of either model in the default suite, and all of the rest in the slow one
        pytest.param(*case, marks=[] if sum(places) % 2 == 0 else pytest.mark.slow, id="-".join(map(str, case)))
        for (*places,), case in zip(
            itertools.product(range(2), range(3), range(2)),
            itertools.product(("tiny_model", "tiny_qwen2"), (0.25, 0.5, 0.7), PATTERNS),
            strict=True,
        )
    ],
)
def test_the_budget_is_exact(
    run_search: Search, request: pytest.FixtureRequest, tmp_path: Path, pattern: str, target: float, kind: str
) -> None:
    model = request.getfixturevalue(kind)
    result = run_search(tmp_path, model=model, pattern=pattern, target=target, settings=SHORT)
    dense = load_file(model / "model.safetensors")
    saved = load_file(result.checkpoint / "model.safetensors")
    counted: dict[str, int] = {name: 0 for name in result.plan.to_json()["units"]}
    for name, tensor in saved.items():
        if in_unit(name) and not (pattern == "unstructured" and name.endswith(".bias")):
            counted[unit_of(name, pattern)] += (
                int(np.count_nonzero(tensor)) if pattern == "unstructured" else tensor.size
            )
    units = json.loads(plan_bytes(result.folder))["units"]
    assert counted == {name: unit["ladder"]["params"][unit["level"]] for name, unit in units.items()}

    held = sum(tensor.size for name, tensor in dense.items() if unit_of(name, pattern) in counted)
    if pattern == "unstructured":
        held -= sum(t.size for name, t in dense.items() if in_unit(name) and name.endswith(".bias"))
    whole = sum(tensor.size for tensor in dense.values())
    limit = whole - held + int((1000 - round(1000 * target)) * held // 1000)
    reached = whole - held + sum(counted.values())
    assert reached <= limit
    assert json.loads(plan_bytes(result.folder))["budget"] == {"params": {"limit": limit, "achieved": reached}}
    for unit in units.values():
        ladder, level = unit["ladder"]["params"], unit["level"]
        assert level == 0 or reached - ladder[level] + ladder[level - 1] > limit
    assert result.summary["measured"]["searched"]["params"] == reached
    assert result.summary["measured"]["uniform"]["params"] <= limit
    assert result.summary["measured"]["two_rate"]["params"] <= limit


# --- the structured checkpoint --------------------------------------------------------------------------------


ISOLATED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "allocator":
            raise ImportError("allocator is not installed here")

sys.meta_path.insert(0, Absent())
try:
    import allocator
except ImportError:
    pass
else:
    raise SystemExit("allocator could be imported")
import numpy as np
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
tokens = torch.from_numpy(np.load(sys.argv[1]))
for folder in sys.argv[2:]:
    remote = (Path(folder) / "modeling_pruned.py").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float32).eval()
    with torch.inference_mode():
        past, steps = None, []
        for start, end in [(0, 9), *((i, i + 1) for i in range(9, tokens.shape[1]))]:
            out = model(tokens[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
        written = [
            model.generate(tokens[:, :8], max_new_tokens=16, min_new_tokens=16, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        np.savez(
            folder + ".npz",
            logits=model(tokens, use_cache=False).logits.numpy(),
            stepwise=torch.cat(steps, 1).numpy(),
            cached=written[0].numpy(),
            uncached=written[1].numpy(),
            params=sum(p.numel() for p in {p.data_ptr(): p for p in model.parameters()}.values()),
        )
"""


def by_hand(plan: Plan, **gone: bool) -> Plan:
    """A plan that removes some sub-blocks whole, and an eighth or so of the rest of the MLPs."""
    levels = [
        unit.num_levels - 1 if unit.name.replace("model.layers.", "b").replace(".", "_") in gone else
        (1 if unit.part == "mlp" else 0)
        for unit in plan.space.units
    ]  # fmt: skip
    allocation = tuple(levels)
    return dataclasses.replace(plan, allocation=allocation, budget=Budget(params=plan.space.cost(allocation)))


@pytest.fixture(scope="session")
def checkpoints(
    finished: dict[str, Any], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Plan, Path, Path]]:
    """Plan, checkpoint and level store, by name; beside each checkpoint what it gave without this package."""
    folder = tmp_path_factory.mktemp("checkpoints")
    plans: dict[str, tuple[Plan, Path]] = {
        pattern: (result.plan, result.folder / "levels") for pattern, result in finished.items()
    }
    plan, store = plans["structured"]
    plans["attention of block 0 removed"] = (by_hand(plan, b0_self_attn=True), store)
    plans["much removed"] = (by_hand(plan, b0_self_attn=True, b0_mlp=True, b1_mlp=True, b2_self_attn=True), store)
    made = {}
    for number, (name, (plan, store)) in enumerate(plans.items()):
        out = folder / f"checkpoint{number}"
        assert allocator.prune(plan, out, model=tiny_model, execution="assemble", store=store) == plan.space.cost(
            plan.allocation
        )
        made[name] = (plan, out, store)
    tokens = np.random.default_rng(0).integers(1, 100, (2, 24))
    np.save(folder / "tokens.npy", tokens)
    subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED, folder / "tokens.npy", *(out for _, out, _ in made.values())],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        check=True,
    )
    return made


NAMES = ["structured", "unstructured", "attention of block 0 removed", "much removed"]


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_loads_without_this_package(checkpoints: dict[str, Any], tiny_model: Path, name: str) -> None:
    """Its logits are those of the live model switched to the plan's levels."""
    from allocator.model.checkpoint.headers import read_checkpoint
    from allocator.model.family.layout import resolve_layout
    from allocator.model.family.schema import find_family
    from allocator.model.live.load import load_model
    from allocator.pruning.levels.assemble import Assembler, LevelSwitch
    from allocator.pruning.levels.store import open_store

    plan, out, folder = checkpoints[name]
    checkpoint = read_checkpoint(tiny_model)
    layout = resolve_layout(find_family("llama"), checkpoint)
    model, store = load_model(checkpoint), open_store(folder, {})
    assert store is not None
    switchboard = LevelSwitch(model, layout, Assembler(checkpoint, layout, plan.space, store, model))
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        switchboard.set(unit.name, level)
    tokens = torch.from_numpy(np.load(out.parent / "tokens.npy"))
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits.numpy()
    found = np.load(f"{out}.npz")
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_generates_with_and_without_cache(checkpoints: dict[str, Any], name: str) -> None:
    found = np.load(f"{checkpoints[name][1]}.npz")
    np.testing.assert_allclose(found["stepwise"], found["logits"], atol=1e-4, rtol=0)
    assert found["cached"].shape == (2, 24)
    np.testing.assert_array_equal(found["cached"], found["uncached"])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unstructured"])
def test_checkpoint_is_smaller_in_proportion(checkpoints: dict[str, Any], tiny_model: Path, name: str) -> None:
    """Bytes of weights are four for each parameter of the plan, as they are for the dense model."""

    def weight_bytes(folder: Path) -> int:
        path = folder / "model.safetensors"
        with path.open("rb") as file:
            return path.stat().st_size - 8 - int(struct.unpack("<Q", file.read(8))[0])

    plan, out, _ = checkpoints[name]
    assert weight_bytes(out) == 4 * plan.space.cost(plan.allocation)
    assert weight_bytes(tiny_model) == 4 * plan.space.cost(plan.space.dense)
    assert int(np.load(f"{out}.npz")["params"]) == plan.space.cost(plan.allocation)


def test_unstructured_checkpoint_is_an_ordinary_one(checkpoints: dict[str, Any], tiny_model: Path) -> None:
    _, out, _ = checkpoints["unstructured"]
    assert (out / "config.json").read_text() == (tiny_model / "config.json").read_text()
    assert not list(out.glob("*.py"))


# --- what a run leaves, and Python ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_result_has_every_figure(finished: dict[str, Any], pattern: str) -> None:
    result = finished[pattern]
    data = json.loads((result.folder / "result.json").read_text())
    assert data == json.loads(json.dumps(result.summary))
    rows = data["measured"]
    assert set(rows) == {"dense", "uniform", "two_rate", "searched", "uniform_assembled", "searched_assembled"}
    for row in rows.values():
        assert {"params", "sparsity", "kl", "nll", "perplexity"} <= set(row)
        assert row["perplexity"] == pytest.approx(np.exp(row["nll"]))
        assert row["params"] <= rows["dense"]["params"]
    assert rows["dense"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows["dense"]["sparsity"] == 0.0
    for name in ("uniform", "two_rate", "searched"):
        assert rows[name]["params"] <= data["budget"]["params"]["limit"]
        assert rows[name]["sparsity"] >= 0.5
        assert rows[name]["kl"] > 0.0
    space = result.plan.space
    journal = [json.loads(line) for line in (result.folder / "journal.jsonl").read_text().splitlines()[1:]]
    assert data["search"]["evaluations"] == len(journal)
    batches: dict[tuple[int, str, int], list[list[int]]] = {}
    for line in journal:
        batches.setdefault((line["batch"], line["split"], line["tokens"]), []).append(line["allocation"])
    macs, spent = space.cost(space.dense, "macs"), 0.0
    for (_, _, tokens), allocations in batches.items():
        before: list[int] = []
        for allocation in sorted(allocations):
            same = next((i for i, (a, b) in enumerate(zip(allocation, before, strict=False)) if a != b), 0)
            block = space.units[same].block
            own = [u.macs[level] for u, level in zip(space.units, allocation, strict=True) if u.block >= block]
            spent += tokens * (space.fixed["macs"] + sum(own)) / macs
            before = allocation
    assert data["search"]["candidate_tokens"] == pytest.approx(spent, abs=1)
    assert data["search"]["store_tokens"] == SETTINGS["tokens.calibration"]
    assert {"store", "search", "execute", "total"} <= set(data["wall_s"])
    assert all(seconds >= 0.0 for seconds in data["wall_s"].values())


def test_plan_holds_nothing_of_where_and_when(finished: dict[str, Any], tiny_model: Path) -> None:
    text = plan_bytes(finished["structured"].folder).decode()
    for word in (str(finished["structured"].folder), str(tiny_model.parent), "worker", "wall", os.uname().nodename):
        assert word not in text


def test_figures_are_those_of_the_saved_checkpoint(
    finished: dict[str, Any], tiny_model: Path, text_folder: Path
) -> None:
    result = finished["structured"]
    again = allocator.evaluate(result.checkpoint, model=tiny_model, text=text_folder, tokens=512, length=64)
    stored = result.summary["measured"]["searched"]
    assert again["params"] == stored["params"]
    assert again["kl"] == pytest.approx(stored["kl"], rel=1e-9)
    assert again["perplexity"] == pytest.approx(stored["perplexity"], rel=1e-9)


def test_from_python(finished: dict[str, Any], tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    """The verbs stay callable after they were called: subpackages of the same names do not take their place."""
    result = finished["structured"]
    plan = allocator.Plan.load(result.folder / "plan.json")
    assert plan == result.plan
    assert plan.to_json() == result.plan.to_json()
    counted = allocator.prune(result.folder / "plan.json", tmp_path / "out", model=tiny_model, text=text_folder)
    assert counted == plan.space.cost(plan.allocation)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", result.checkpoint)]
    assert weights[0] == weights[1]
    for name in ("search", "prune", "evaluate", "inspect"):
        assert callable(getattr(allocator, name)), name
    assert sys.modules["allocator.searchers"].__file__
    with pytest.raises(allocator.UserError, match="exists already"):
        allocator.prune(plan, tmp_path / "out", model=tiny_model)
    with pytest.raises(allocator.UserError, match="the run exists already"):
        allocator.search(tiny_model, runs_dir=result.folder.parent, name=result.folder.name)


def test_a_search_ends_the_cluster_it_started(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    """The next search of the process may ask for another number of workers."""
    script = f"""
import allocator, ray
allocator.search({str(tiny_model)!r}, text={str(text_folder)!r}, runs_dir={str(tmp_path)!r}, name="run", workers=1,
                 settings={assignments(SHORT)!r})
assert not ray.is_initialized()
"""
    environment = without_cluster()
    process = Python(["-c", script], tmp_path, environment)
    try:
        assert process.wait(DEADLINE_S) == 0
        until(lambda: not in_session(process.pid), "the processes of the cluster to end", 0.1)
    finally:
        for pid, (_, session, _) in processes().items():
            if session == process.pid:
                os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "run" / "plan.json").exists()
