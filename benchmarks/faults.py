"""Faults, on real local Ray clusters: signals, full disks, torn journals, clock jumps, second drivers.

    python -m benchmarks.faults --work /tmp/faults [--trials 100] [--kinds driver,worker] [--at-once 2]

Every trial is a search of its own that meets one fault at a seeded moment, is resumed if it stopped, and must come to
the plan of the undisturbed search, byte for byte. A trial that is done is a line of ``trials.jsonl`` in the work
folder, and is not done again. Full disks are tmpfs mounts and take root; clock jumps take Debian's ``faketime`` and
``cc``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
SETTINGS = (
    "tokens.sequence_length=128",
    "tokens.calibration=2048",
    "tokens.selection=1024",
    "tokens.test=1024",
    "search.tokens=[512,1024,4096]",
)
DEADLINE_S = 400.0
DISK_BYTES = 64 << 20
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
SLEEP = """#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *asked, struct timespec *left) {
  return syscall(SYS_clock_nanosleep, clock, flags, asked, left) ? errno : 0;
}
"""

PHASES = ("starting", "store 1", "search 1", "store 2", "search 2", "executing", "writing")
"""Of a search of two rounds; selection is the end of the second search."""

COLOURS = ("#999999", "#e69f00", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#cc79a7")

Moment = tuple[int, int]
"""A phase, and how many units, journal lines or checkpoints of it are on the disk."""


def phases(*names: str) -> tuple[int, ...]:
    return tuple(PHASES.index(name) for name in names)


WORKING = phases(*PHASES[1:6])


# --- a driver that writes down what its workers measure -------------------------------------------------------------


def drive(log: Path, arguments: Sequence[str]) -> None:
    """Be ``allocator``, with workers that note when they begin measurements, and each that they finish."""
    from allocator.cli import main as allocator
    from allocator.core.files import fingerprint
    from allocator.pool import dispatch as ray_pool
    from allocator.pool.worker import Worker

    class Watched(Worker):
        def _note(self, count: int, request: Any = None, chunk: int = 0) -> None:
            space = fingerprint(self._spec.space.to_json())[7:15]
            key = None if request is None else f"{space} {request.key}"
            line = json.dumps({"worker": os.getpid(), "begun": count, "key": key, "chunk": chunk})
            with log.open("a") as file:
                file.write(line + "\n")

        def measure(self, requests: Any) -> Any:
            self._note(len(requests))
            outcomes = []
            for outcome in self._engine.measure_batch(requests):
                self._note(0, outcome.request)
                outcomes.append(outcome)
            return outcomes

        def expand(self, request: Any, index: int) -> Any:
            self._note(1)
            chunk = super().expand(request, index)
            self._note(0, request, index)
            return chunk

    ray_pool.Worker = Watched
    sys.argv = ["allocator", *arguments]
    allocator()


def noted(log: Path, start: int = 0) -> list[dict[str, Any]]:
    """Return what was noted in a log after some of its bytes."""
    if not log.exists():
        return []
    lines = log.read_bytes()[start:].split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def interrupted(logs: Sequence[Path]) -> int:
    """Return how many evaluations were under way when their workers ended."""
    left: Counter[tuple[Path, int]] = Counter()
    for log in logs:
        for line in noted(log):
            own = (log, line["worker"])
            left[own] = line["begun"] if line["begun"] else left[own] - 1
    return sum(count > 0 for count in left.values())


# --- what is on the disk, and who is alive --------------------------------------------------------------------------


def reached(run: Path) -> Moment:
    """Return how far a run is, from its files."""
    try:
        header, *lines = (run / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    except (FileNotFoundError, ValueError):
        return 0, 0
    second, moved = b'"round":{' in header, (run / "rounds" / "1" / "journal.jsonl").exists()
    if (run / "plan.json").exists():
        return PHASES.index("writing"), 0
    if executing := list(run.glob(".executing-*")):
        with contextlib.suppress(FileNotFoundError):
            return PHASES.index("executing"), sum((path / "config.json").exists() for path in executing[0].iterdir())
    if (run / "levels").exists() and second == moved:
        return PHASES.index("search 2" if second else "search 1"), len(lines)
    units = len(list(run.glob(".levels.*.partial/*.safetensors"))) if second == moved else 0
    return PHASES.index("store 2" if moved else "store 1"), units


def known(run: Path) -> set[str]:
    """Return the keys of what the journals of a run know."""
    from allocator.core.files import fingerprint
    from allocator.core.journal import Journal

    keys = set()
    for path in (run / "rounds" / "1" / "journal.jsonl", run / "journal.jsonl"):
        if path.exists():
            journal = Journal.read(path)
            space = fingerprint(journal.space.to_json())[7:15]
            keys |= {f"{space} {outcome.request.key}" for batch in journal.batches for outcome in batch}
    return keys


def processes() -> dict[int, tuple[int, str]]:
    """Return the session and the title of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat, title = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
                found[int(entry.name)] = (int(stat.rpartition(")")[2].split()[3]), title.decode(errors="replace"))
    return found


class Started:
    """A process in a session of its own, so that all that it starts can be found."""

    def __init__(self, command: Sequence[object], output: Path, environment: dict[str, str]) -> None:
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*map(str, command)],
                cwd=output.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.output = output

    def named(self, start: str) -> list[int]:
        """Return the processes of the session whose titles start so."""
        own = self.process.pid
        return sorted(
            pid for pid, (session, title) in processes().items() if session == own and title.startswith(start)
        )

    def clean(self) -> None:
        """End all of the session."""
        for _ in range(100):
            if not (left := self.named("")):
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)
        self.process.wait()


# --- one trial ------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One search that meets a fault.

    Attributes:
        place: Its folder; the run is ``runs/run`` in it.
        model: The model.
        draw: Its randomness.
        moment: When the fault comes.
        delay_s: How long after it.
        environment: Of its drivers.
        address: Of a cluster that is there already.
        codes: What drivers ended with, and what they should have.
        twice: Measurements that were in the journal, and were made again.
        recovered_s: From the fault, or the start of the driver that resumes, to the next unit, line or checkpoint.
    """

    place: Path
    model: Path
    draw: random.Random
    moment: Moment = (0, 0)
    delay_s: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    address: str | None = None
    codes: list[tuple[int, int]] = field(default_factory=list)
    twice: int = 0
    recovered_s: float | None = None
    started: list[Started] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.place / "runs" / "run"

    @property
    def drivers(self) -> list[Started]:
        return [each for each in self.started if each.output.name.startswith("driver")]

    def start(self, *more: str) -> Started:
        """Start a driver."""
        number = len(self.logs) + 1
        self.logs.append(self.place / f"measured-{number}.jsonl")
        command: list[object] = [sys.executable, "-m", "benchmarks.faults", "--driver", self.logs[-1], "search"]
        command += ["--model", self.model, "--runs-dir", "runs", "--name", "run", "--workers", 2]
        command += [] if self.address is None else ["--address", self.address]
        for assignment in SETTINGS:
            command += ["--set", assignment]
        self.started.append(Started([*command, *more], self.place / f"driver-{number}.txt", self.environment))
        return self.started[-1]

    def again(self) -> Started:
        """Go on as a user would: resume what has begun."""
        return self.start(*(["--resume"] if self.run.exists() else []))

    def to_moment(self, driver: Started) -> None:
        """Wait until the fault is due."""
        self._wait(lambda: reached(self.run) >= self.moment or driver.process.poll() is not None, "the moment")
        if driver.process.poll() is not None:
            raise RuntimeError(f"the driver ended before the fault: {driver.output.read_text()[-2000:]}")
        time.sleep(self.delay_s)

    def finish(self, driver: Started, expected: int, since: Moment | None = None, once: str = "") -> None:
        """Wait for a driver to end; ``since`` is how far the run was when it had to recover.

        What is done before it says ``once`` is done by workers that outlive another driver for a moment.
        """
        begun_s = time.monotonic()

        def over() -> bool:
            nonlocal since
            if since is not None and once not in driver.output.read_text():
                since = max(since, reached(self.run))
            elif since is not None and self.recovered_s is None and reached(self.run) > since:
                self.recovered_s = time.monotonic() - begun_s
            return driver.process.poll() is not None

        self._wait(over, f"{driver.output.name} to end", 0.05)
        if since is not None and self.recovered_s is None:
            self.recovered_s = time.monotonic() - begun_s
        self.codes.append((driver.process.returncode, expected))

    def survive(self, driver: Started, fault: Callable[[], None]) -> None:
        """Have a fault that the driver must outlive."""
        before, size = known(self.run) if self.run.exists() else set(), self._size()
        since = reached(self.run)
        fault()
        self.finish(driver, 0, since)
        self._count_twice(before, self.logs[-1], size)

    def resume(self) -> None:
        """Go on after a fault that the driver did not outlive."""
        before = known(self.run) if self.run.exists() else set()
        since, once = reached(self.run), "resuming" if self.run.exists() else ""
        self.finish(self.again(), 0, since, once)
        self._count_twice(before, self.logs[-1], 0)

    def victims(self, what: str = "ray::Watched") -> list[int]:
        """Return workers, once there is one."""
        found: list[int] = []
        self._wait(lambda: found.extend(pid for s in self.started for pid in s.named(what)) or found, what)
        return found

    def record(self, reference: Path) -> dict[str, Any]:
        """Return what came of it."""
        said = "".join(driver.output.read_text(errors="replace") for driver in self.drivers)
        plan, expected = (run / "plan.json" for run in (self.run, reference))
        same = plan.exists() and plan.read_bytes() == expected.read_bytes()
        left = sorted({path.name for path in self.run.iterdir()} ^ {path.name for path in reference.iterdir()})
        beside = sorted(path.name for path in self.run.parent.iterdir() if path.name != "run")
        done = [(line["key"], line["chunk"]) for log in self.logs for line in noted(log) if line["key"]]
        recorded = known(self.run)
        used = {each for each in done if each[0] in recorded}
        wrong = [f"ended with {found} and not {right}" for found, right in self.codes if found != right]
        wrong += [] if same else ["another plan"]
        wrong += ["a traceback"] if "Traceback" in said else []
        wrong += [f"differs in {', '.join(left + beside)}"] if left + beside else []
        return {
            "survived": not wrong,
            "wrong": wrong,
            "twice": self.twice,
            "lost": len(done) - len(used) + interrupted(self.logs),
            "evaluations": len(recorded),
            "recovered_s": None if self.recovered_s is None else round(self.recovered_s, 2),
        }

    def clean(self) -> None:
        for each in self.started:
            each.clean()

    def _count_twice(self, before: set[str], log: Path, start: int) -> None:
        self.twice += sum(line["key"] in before for line in noted(log, start))

    def _size(self) -> int:
        return self.logs[-1].stat().st_size if self.logs[-1].exists() else 0

    @staticmethod
    def _wait(condition: Callable[[], object], what: str, pause_s: float = 0.005) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > end_s:
                raise TimeoutError(f"waited {DEADLINE_S:.0f} s for {what}")
            time.sleep(pause_s)


# --- the faults -----------------------------------------------------------------------------------------------------


def kill_driver(trial: Trial) -> None:
    driver = trial.start()
    trial.to_moment(driver)
    driver.process.kill()
    driver.process.wait()
    trial.resume()


def tear_line(trial: Trial) -> None:
    driver = trial.start()
    trial.to_moment(driver)
    journal = trial.run / "journal.jsonl"
    trial._wait(lambda: journal.read_bytes().count(b"\n") > 1, "an outcome")  # headers are written whole
    driver.process.kill()
    driver.process.wait()
    whole = journal.read_bytes()
    last = len(whole) - (whole.rfind(b"\n", 0, -1) + 1)
    os.truncate(journal, len(whole) - trial.draw.randint(1, last - 1))
    trial.resume()


def kill_worker(trial: Trial) -> None:
    driver = trial.start()
    trial.to_moment(driver)
    victims = trial.victims()
    trial.survive(driver, lambda: os.kill(trial.draw.choice(victims), signal.SIGKILL))


def hang_worker(trial: Trial) -> None:
    driver = trial.start()
    trial.to_moment(driver)
    victims = trial.victims()
    trial.survive(driver, lambda: os.kill(trial.draw.choice(victims), signal.SIGSTOP))


def kill_raylet(trial: Trial) -> None:
    """Of a second node; there is one worker on each, and what the second had moves to the first."""
    trial.environment["RAY_AUTH_MODE"] = "disabled"
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        port, other = (each.getsockname()[1] for each in (one, two))
    ray = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", 1, "--node-ip-address", "127.0.0.1"]
    temporary = trial.environment["RAY_TMPDIR"]
    head = ["--head", "--port", port, "--ray-client-server-port", other, "--temp-dir", temporary]
    trial.address = f"127.0.0.1:{port}"
    quiet = ["--include-dashboard", "false", "--disable-usage-stats"]
    trial.started.append(Started([*ray, *head, *quiet], trial.place / "head.txt", trial.environment))
    trial._wait(lambda: _listening(port), "the head node")
    second = Started([*ray, "--address", trial.address], trial.place / "node.txt", trial.environment)
    trial.started.append(second)
    trial._wait(lambda: "Ray runtime started" in second.output.read_text(), "the second node")
    driver = trial.start()
    trial.to_moment(driver)
    (raylet,) = [pid for pid, (s, title) in processes().items() if s == second.process.pid and "/raylet\0" in title]
    trial.survive(driver, lambda: os.kill(raylet, signal.SIGKILL))


def fill_disk(trial: Trial) -> None:
    runs = trial.place / "runs"
    runs.mkdir()
    with mounted(runs):
        driver = trial.start()
        trial.to_moment(driver)
        ballast = runs / "ballast"
        fill(ballast)
        trial.finish(driver, 2)
        full = "No space left on device" in driver.output.read_text()
        if trial.codes[-1][0] == 0 and (trial.run / "report.html").exists():
            trial.codes[-1] = (0, 0)  # there was nothing left to write
        elif not full:
            trial.codes.append((-1, 2))
        ballast.unlink()
        trial.resume()
        shutil.copytree(runs, trial.place / "kept")
    runs.rmdir()
    (trial.place / "kept").rename(runs)


def jump_clock(trial: Trial) -> None:
    """Of the driver and of all that it starts; hours, back or forth."""
    offset = trial.place / "clock"
    offset.write_text("+0\n")
    trial.environment |= {
        "LD_PRELOAD": f"{sleeper(trial.place)}:{FAKETIME}",
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    driver = trial.start()
    trial.to_moment(driver)
    hours = trial.draw.choice((-1, 1)) * trial.draw.uniform(0.5, 48)

    def jump() -> None:
        following = offset.with_suffix(".next")
        following.write_text(f"{hours:+.3f}h\n")
        following.rename(offset)

    trial.survive(driver, jump)


def sleeper(folder: Path) -> Path:
    """Compile what faketime needs before it: it takes Python's sleep until a monotonic time for one of the day."""
    source, library = folder / "sleep.c", folder / "sleep.so"
    source.write_text(SLEEP)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def start_two(trial: Trial) -> None:
    """At once, or one while another runs, by the same command and by --resume."""
    if trial.moment[0] == 0:
        both = [trial.start(), trial.start()]
        trial._wait(lambda: any(each.process.poll() is not None for each in both), "the refusal")
        refused = next(each for each in both if each.process.poll() is not None)
        (winner,) = (each for each in both if each is not refused)
        trial.finish(refused, 2)
        trial.finish(winner, 0)
    else:
        winner = trial.start()
        trial.to_moment(winner)
        winner.process.send_signal(signal.SIGSTOP)  # or it is done before the others have loaded their modules
        for other in [trial.start(), trial.start("--resume")]:
            trial.finish(other, 2)
        winner.process.send_signal(signal.SIGCONT)
        trial.finish(winner, 0)
    for driver in trial.drivers:
        if driver is not winner and driver.output.read_text().count("error: ") != 1:
            trial.codes.append((-1, 2))


def _listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


@dataclass(frozen=True)
class Kind:
    """A fault: what it does, in words, in which phases, and from how many things of a phase on."""

    what: str
    meet: Callable[[Trial], None]
    phases: tuple[int, ...] = WORKING
    least: int = 0


KINDS = {
    "driver": Kind("kill -9 of the driver", kill_driver, phases(*PHASES)),
    "worker": Kind("kill -9 of a worker", kill_worker),
    "raylet": Kind("kill -9 of a node's raylet", kill_raylet),
    "disk": Kind("full disk", fill_disk, phases(*PHASES[1:])),
    "torn": Kind("torn last line", tear_line, phases("search 1", "search 2", "executing"), 1),
    "clock": Kind("clock jump", jump_clock),
    "hang": Kind("a worker that hangs", hang_worker),
    "two": Kind("two drivers", start_two, phases(*PHASES[:6])),
}


# --- all of them ----------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """Six blocks of random weights, with the packaged tokenizer."""
    import torch
    import transformers

    from allocator.model.checkpoint.headers import PACKAGED, locate

    packaged = locate(PACKAGED)
    shape = {
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(packaged, **shape))
    model.to(torch.float32).save_pretrained(folder)
    for path in packaged.glob("tokenizer*"):
        shutil.copy(path, folder)


@contextlib.contextmanager
def opened(place: Path, model: Path, draw: random.Random) -> Iterator[Trial]:
    """A trial with a folder for Ray, and nothing left alive after it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # short, for the names of sockets are limited
    with tempfile.TemporaryDirectory(prefix="faults", ignore_cleanup_errors=True) as temporary:
        environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": temporary, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        trial = Trial(place, model, draw, environment=environment)
        try:
            yield trial
        finally:
            trial.clean()


def make_reference(work: Path) -> dict[str, Any]:
    """Make the undisturbed search once; return how much of what is on the disk after each phase."""
    file = work / "reference.json"
    if not file.exists():
        if not (work / "model").exists():
            make_model(work / "model")
        with opened(work / "reference", work / "model", random.Random(0)) as trial:
            seen: dict[int, int] = dict.fromkeys(range(len(PHASES)), 0)
            begun_s = time.monotonic()
            driver = trial.start()
            while driver.process.poll() is None:
                phase, count = reached(trial.run)
                seen[phase] = max(seen[phase], count)
                time.sleep(0.002)
            wall_s = time.monotonic() - begun_s
            assert driver.process.returncode == 0, driver.output.read_text()
            lost = trial.record(trial.run)["lost"]
        file.write_text(json.dumps({"counts": list(seen.values()), "wall_s": round(wall_s, 1), "lost": lost}))
    return json.loads(file.read_text())


def run_trial(work: Path, kind: str, number: int, reference: dict[str, Any]) -> dict[str, Any]:
    """Do one trial; its seed is its kind and number."""
    draw, fault = random.Random(f"{kind} {number}"), KINDS[kind]
    phase = fault.phases[(number + [*KINDS].index(kind)) % len(fault.phases)]
    count = draw.randint(fault.least, max(fault.least, reference["counts"][phase] - 1))
    place, result = work / f"{kind}-{number}", {"survived": False, "twice": 0, "lost": 0}
    with opened(place, work / "model", draw) as trial:
        trial.moment = (phase, count)
        trial.delay_s = draw.uniform(0, 0.5 * reference["wall_s"] if phase == 0 else 0.05)
        try:
            fault.meet(trial)
            result = trial.record(work / "reference" / "runs" / "run")
        except Exception as error:
            result["wrong"] = [str(error) or type(error).__name__]
            (place / "error.txt").write_text(traceback.format_exc())
    if result["survived"]:
        shutil.rmtree(place)
    return {"kind": kind, "number": number, "phase": PHASES[phase], "count": count, **result}


def read_trials(work: Path) -> list[dict[str, Any]]:
    file = work / "trials.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_trials(work: Path, kinds: Sequence[str], count: int, at_once: int) -> None:
    """Do what is not done yet of so many trials, of every kind in turn."""
    reference = make_reference(work)
    wanted = [(kinds[index % len(kinds)], index // len(kinds)) for index in range(count)]
    done = {(line["kind"], line["number"]) for line in read_trials(work)}
    lock = threading.Lock()

    def one(trial: tuple[str, int]) -> None:
        begun_s = time.monotonic()
        line = run_trial(work, *trial, reference)
        with lock, (work / "trials.jsonl").open("a") as file:
            file.write(json.dumps({**line, "wall_s": round(time.monotonic() - begun_s, 1)}) + "\n")
            print(f"{line} {time.monotonic() - begun_s:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, [trial for trial in wanted if trial not in done]))


def summary(work: Path) -> dict[str, Any]:
    lines = read_trials(work)
    rows = {}
    for kind in KINDS:
        own = [line for line in lines if line["kind"] == kind]
        if not own:
            continue
        recovered = [line["recovered_s"] for line in own if line.get("recovered_s") is not None]
        rows[kind] = {
            "trials": len(own),
            "survived": sum(line["survived"] for line in own),
            "twice": sum(line["twice"] for line in own),
            "lost_mean": round(mean(line["lost"] for line in own), 2),
            "lost_max": max(line["lost"] for line in own),
            "recovered_s": round(mean(recovered), 1) if recovered else None,
            "recovered_max_s": max(recovered, default=None),
        }
    return {"reference": make_reference(work), "kinds": rows, "trials": lines}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| fault | trials | survived | measured twice | lost in flight, mean | most | seconds to go on | most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in found["kinds"].items():
        seconds = [row["recovered_s"], row["recovered_max_s"]]
        recovered = " | ".join("–" if each is None else f"{each:.0f}" for each in seconds)
        lines.append(
            f"| {KINDS[kind].what} | {row['trials']} | {row['survived']} | {row['twice']} | {row['lost_mean']:.1f} | "
            f"{row['lost_max']} | {recovered} |"
        )
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> str:
    """Draw how long every trial took to go on, by fault and phase."""
    from matplotlib.figure import Figure  # which drivers do without

    from allocator.report.figures import to_svg

    picture = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = picture.subplots()
    rows = [*found["kinds"]]
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        own = [t for t in found["trials"] if t["phase"] == phase and t.get("recovered_s") is not None]
        spread = [rows.index(t["kind"]) + 0.1 * (PHASES.index(phase) - 3) for t in own]
        axes.plot([t["recovered_s"] for t in own], spread, "o", color=colour, ms=4.5, mew=0, label=phase)
    axes.set_yticks(range(len(rows)), [KINDS[kind].what for kind in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds to the next unit, journal line or checkpoint", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    picture.legend(fontsize=7, frameon=False, loc="outside right center", title="in", title_fontsize=7)
    return to_svg(picture, "faults")


def main() -> None:
    if sys.argv[1:2] == ["--driver"]:
        drive(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    run_trials(work, arguments.kinds.split(","), arguments.trials, arguments.at_once)
    found = summary(work)
    (RESULTS / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "faults.svg").write_text(figure(found))
    print(table(found))


if __name__ == "__main__":
    main()
