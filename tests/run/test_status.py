"""What a run says of itself while it runs, and what is seen of it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from forked import Command

from allocator.core.errors import UserError
from allocator.core.files import write_json
from allocator.report.tables.status import format_status
from allocator.run import recorder as recording
from allocator.run.recorder import Recorder
from allocator.run.reporting import Silent
from allocator.run.status import read_status

SLOW = [  # for so small a model
    "tokens.sequence_length=64",
    "tokens.calibration=512",
    "tokens.selection=256",
    "tokens.test=512",
    "search.method=evolution",
    "search.evolution.generations=2000",
    "search.evolution.patience=2000",
    "search.evolution.offspring=8",
    "search.evolution.tokens=[1024,4096]",
    "search.evolution.survivors=[2,1]",
    "pruner.name=magnitude",
    "pattern=unstructured",
]


def written(folder: Path) -> Any:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    return now


class Heard(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start_phase(self, name: str, total: int | None = None) -> None:
        self.calls.append(("phase", name, total))

    def advance(self, done: int, note: str = "") -> None:
        self.calls.append(("step", done, note))

    def notify(self, message: str) -> None:
        self.calls.append(("say", message))


def test_it_passes_on_what_it_hears(tmp_path: Path) -> None:
    heard = Heard()
    with Recorder(heard) as recorder:
        recorder.start_phase("checking")
        recorder.advance(1, "note")
        recorder.notify("message")
    assert heard.calls == [("phase", "checking", None), ("step", 1, "note"), ("say", "message")]
    assert not list(tmp_path.iterdir()), "nothing is written before the run has a folder"


def test_pace_and_time_left(tmp_path: Path, clock: list[float]) -> None:
    with Recorder(Silent()) as recorder:
        recorder.start_recording(tmp_path, 7)
        recorder.start_phase("search", 10)
        assert written(tmp_path) | {"phase": "search", "total": 10, "evaluations": 7} == written(tmp_path)
        assert "evaluations_per_s" not in written(tmp_path)
        for batch in (1, 2, 3):
            clock[0] += 2.0
            recorder.record_results(7 + 4 * batch, batch, {"best KL": 0.5})
            recorder.advance(batch)
        now = written(tmp_path)
        assert (now["evaluations"], now["evaluations_per_s"], now["phase_left_s"]) == (19, 2.0, 14.0)
        assert (now["front"], now["reached"], now["done"]) == (3, {"best KL": 0.5}, 3)
        clock[0] += 0.5
        recorder.advance(4)
        assert written(tmp_path) == now, "not more than once in a second"
    ended = written(tmp_path)
    assert (ended["state"], ended["done"]) == ("finished", 4)
    assert not ended.keys() & {"evaluations_per_s", "phase_left_s", "workers"}


def test_only_the_last_minute_tells_the_pace(tmp_path: Path, clock: list[float]) -> None:
    """What a resumed run knows already passes in no time."""
    with Recorder(Silent()) as recorder:
        recorder.start_recording(tmp_path, 100)
        recorder.start_phase("search", 200)
        for batch in range(100):
            recorder.record_results(100, 1, {})
            recorder.advance(batch)
        for batch in range(100, 140):
            clock[0] += 10.0
            recorder.record_results(batch, 1, {})
            recorder.advance(batch)
        assert written(tmp_path)["phase_left_s"] == pytest.approx(610.0)
        assert written(tmp_path)["evaluations_per_s"] == 0.1


def test_workers_are_those_alive(tmp_path: Path) -> None:
    class Pool:
        alive = 3

    with Recorder(Silent()) as recorder:
        recorder.start_recording(tmp_path, 0)
        recorder.attach(None)
        recorder.start_phase("one")
        assert written(tmp_path)["workers"] == 0
        recorder.attach(Pool())
        recorder.start_phase("two")
        assert written(tmp_path)["workers"] == 3


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (UserError("workers: ray://u:token@head:1 and 10.1.2.3:6379 died"), "failed", "<address> and <address> died"),
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
        (KeyboardInterrupt(), "stopped", ""),
        (SystemExit(15), "stopped", ""),
    ],
)
def test_an_end_that_is_none(tmp_path: Path, error: BaseException, state: str, said: str) -> None:
    def run() -> None:
        with Recorder(Silent()) as recorder:
            recorder.start_recording(tmp_path, 0)
            raise error

    with pytest.raises(type(error)):
        run()
    assert written(tmp_path)["state"] == state
    assert written(tmp_path).get("error", "").endswith(said)
    assert "token" not in (tmp_path / "status.json").read_text()


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "write_json", full)
    with Recorder(Silent()) as recorder:
        recorder.start_recording(tmp_path, 0)
        recorder.start_phase("search")
    assert not list(tmp_path.iterdir())


def test_it_beats_while_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "BEAT_S", 0.05)
    with Recorder(Silent()) as recorder:
        recorder.start_recording(tmp_path, 0)
        before = (tmp_path / "status.json").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "status.json").stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("elsewhere", "age_s", "state"),
    [(False, 0, "lost"), (True, 0, "running"), (True, 59, "running"), (True, 62, "lost")],
)
def test_a_run_without_a_process(tmp_path: Path, elsewhere: bool, age_s: int, state: str) -> None:
    updated = datetime.now(timezone.utc) - timedelta(seconds=age_s)
    machine = "another" if elsewhere else recording.machine()
    status = {"schema": 1, "kind": "allocator.status", "state": "running", "phase": "search", "done": 1, "total": 4}
    write_json(tmp_path / "status.json", {**status, "machine": machine, "updated": updated.isoformat()})
    (tmp_path / "journal.jsonl").write_text("")
    found = read_status(tmp_path)
    assert (found["state"], round(found["age_s"])) == (state, age_s)
    assert ("not running" in format_status(found)) == (state == "lost")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable status"),
        ("[]", "is a JSON object"),
        ("{}", "not a status of schema 1"),
        ('{"kind": "allocator.plan", "schema": 3, "updated": "2026-01-01T00:00:00+00:00"}', "not a status of schema 1"),
    ],
)
def test_damaged(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_status(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run\. A job makes it once it has started"):
        read_status(tmp_path / "submitted")
    with pytest.raises(UserError, match="no such status of a run"):
        read_status(tmp_path)
    (tmp_path / "journal.jsonl").write_text("")
    with pytest.raises(UserError, match="from before there was one"):
        read_status(tmp_path)


def test_a_search_that_is_watched_stopped_and_killed(
    tmp_path: Path, tiny_model: Path, text_folder: Path, request: pytest.FixtureRequest
) -> None:
    given = ["--model", tiny_model, "--text", text_folder, "--workers", "0", "--runs-dir", tmp_path, "--name", "run"]
    settings = [f"--set={each}" for each in SLOW]
    command = ["search", *given, *settings]
    run = tmp_path / "run"

    def searching(*more: str) -> Command:
        process = Command([*command, *more])
        request.addfinalizer(process.kill)
        return process

    first = searching()
    seen = until(run, lambda status: status["phase"] == "search" and status["done"] >= 2)
    assert seen["state"] == "running"
    assert seen["total"] > 2000
    assert seen["evaluations"] > 0
    assert seen["reached"]["best KL"] > 0
    refusal = Command([*command, "--resume"])
    assert "another process is writing this run" in refusal.communicate()[1]
    assert refusal.returncode != 0
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "Traceback" not in said
    assert "allocator search --resume --name run" in said
    assert read_status(run)["state"] == "stopped"

    second = searching("--resume-or-begin")
    until(run, lambda status: status["phase"] == "search" and status["evaluations"] > seen["evaluations"] + 8)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert read_status(run)["state"] == "lost"
    assert "not running" in format_status(read_status(run))


def until(run: Path, reached: Callable[[Any], bool]) -> Any:
    """The first status of a run that is running and has got so far."""
    for _ in range(1200):
        time.sleep(0.05)
        if (run / "status.json").exists() and (status := read_status(run))["state"] == "running" and reached(status):
            return status
    raise AssertionError("it did not get there")


def test_no_name_of_the_machine_is_told() -> None:
    assert re.fullmatch("[0-9a-f]{12}", recording.machine())
    assert recording.machine() not in (os.uname().nodename, "unknown")
