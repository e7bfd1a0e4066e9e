"""Jobs on a cluster of two nodes, by the commands of docs/cluster.md: submitted, watched, stopped, resumed."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Command, without_cluster

import allocator
from allocator.commands.compare import run_comparison
from allocator.commands.search import run_search
from allocator.core.errors import UserError
from allocator.run.config.load import validate
from allocator.run.config.run import RunConfig
from allocator.run.job_package import COMMAND
from allocator.run.status import read_status

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "search_spaces" / "cluster" / "rayjob.yaml"
RUN_FILE = """
model: model
text: text
workers: 2
pattern: unstructured
tokens: {sequence_length: 64, calibration: 512, selection: 256, test: 512}
pruner: {name: magnitude}
search:
  method: evolution
  evolution: {generations: 200, patience: 200, offspring: 8, tokens: [256, 1024], survivors: [2, 1]}
"""
MARK = "ALLOCATOR_TEST_CLUSTER"
DEADLINE_S = 600.0


def recipe() -> list[str]:
    """The commands of the section on clusters."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = page.partition("## On a Ray cluster\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for line in block.splitlines()]


@dataclass
class Shell:
    """Runs commands of the page where its ports are taken by others, and remembers what runs on."""

    folder: Path
    environment: dict[str, str]
    ports: dict[str, int]
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def adapted(self, command: str) -> str:
        for usual, port in (("6379", "gcs"), ("8265", "dashboard")):
            command = command.replace(f":{usual}", f":{self.ports[port]}")
        command = command.replace("search_spaces/runs/structured.yaml", "run.yaml")
        if command.startswith("ray start"):
            command += " --block --disable-usage-stats --object-store-memory 80000000"
        if "--head" in command:
            command += f" --port {self.ports['gcs']} --dashboard-port {self.ports['dashboard']}"
            command += f" --dashboard-agent-listen-port {self.ports['agent']}"
            command += f" --ray-client-server-port {self.ports['client']} --temp-dir {self.folder / 'ray'}"
        return command.replace("/tmp/ray-second", str(self.folder / "ray-second"))

    def start(self, command: str) -> subprocess.Popen[str]:
        log = (self.folder / f"log{len(self.running)}.txt").open("w")
        self.running.append(
            subprocess.Popen(
                ["bash", "-c", f"exec {self.adapted(command)}"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return self.running[-1]

    def __call__(self, command: str, code: int = 0) -> str:
        """Run to the end, and return what was said."""
        done = subprocess.run(
            ["bash", "-c", self.adapted(command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == code, (command, done)
        assert "Traceback" not in done.stdout + done.stderr, done
        return done.stdout + done.stderr

    def until(self, reached: Callable[[], Any], seconds: float = DEADLINE_S) -> None:
        """Wait."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if reached():
                return
            time.sleep(0.2)
        raise AssertionError([path.read_text() for path in self.folder.glob("log*.txt")])

    def up(self, node: int) -> bool:
        """Whether a node has started."""
        return "Ray runtime started" in (self.folder / f"log{node}.txt").read_text()


def free_ports(names: list[str]) -> dict[str, int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}


def marked(mark: str) -> list[int]:
    """Processes that were started with a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def shell(tiny_model: Path, text_folder: Path) -> Iterator[Shell]:
    """A folder with a run file, and commands in it; nothing that they start outlives the test."""
    mark, token = secrets.token_hex(8), secrets.token_hex(32)
    folder = Path(tempfile.mkdtemp(prefix="jobs"))  # Ray's sockets need short paths
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(text_folder, folder / "text")
    (folder / "run.yaml").write_text(RUN_FILE)
    environment = {name: value for name, value in without_cluster().items() if not name.startswith("PYTHONPATH")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN": token,
        "HOME": str(folder),
        "NO_COLOR": "1",
        MARK: mark,
    }
    shell = Shell(folder, environment, free_ports(["gcs", "dashboard", "agent", "client"]))
    yield shell
    deadline = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < deadline:
        for process_id in left:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        for process in shell.running:
            process.wait()
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


def test_the_recipe(shell: Shell) -> None:
    """Of the page, command by command; the plan is that of a search on no cluster, byte for byte."""
    export, token, head, second, submit, status, jobs, logs, stop, again, down = recipe()
    assert down == "ray stop", "which is left to the fixture, for it would stop the clusters of others too"
    name, _, value = export.removeprefix("export ").partition("=")
    shell.environment[name] = value
    shell(token)
    for node, command in enumerate((head, second)):
        shell.start(command)
        shell.until(lambda node=node: shell.up(node))
    assert "mine-1" in shell(submit)
    run = shell.folder / "runs" / "mine"
    shell.until(lambda: searching(run))
    said = shell(status)
    for expected in ("state       running", "phase       search, ", "best KL ", "per second"):
        assert expected in said
    assert "the job mine-1 is on this run" in shell(submit, 2)
    assert "submission_id='mine-1'" in shell(jobs)
    shell(stop)
    log = shell(logs)
    assert "search ..." in log
    assert "stopped; nothing measured is lost. Submit it again to continue" in log
    assert "Traceback" not in log
    assert shell(status).startswith("state       stopped")
    known = len((run / "journal.jsonl").read_text().splitlines())

    other = shell(f"{again} --set seed=1 --installed --json", 2)
    assert "mine: holds another search: its seed is 0, and this one's is 1" in other
    assert len((run / "journal.jsonl").read_text().splitlines()) == known

    followed = shell(again)
    assert "resuming" in followed
    assert f"plan        {run / 'plan.json'}" in followed
    assert shell(status).startswith("state       finished")

    given = {"runs_dir": shell.folder / "alone", "name": "mine", "workers": 0, "config": shell.folder / "run.yaml"}
    alone = allocator.search(shell.folder / "model", text=shell.folder / "text", **given)
    assert (run / "plan.json").read_bytes() == (alone.folder / "plan.json").read_bytes()
    kept = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    for secret in (shell.environment["RAY_AUTH_TOKEN"], f":{shell.ports['gcs']}", f":{shell.ports['dashboard']}"):
        assert not [content for content in kept if secret.encode() in content]
        assert secret not in log.partition("Running entrypoint")[2]


def searching(run: Path) -> bool:
    """Whether a search is on its way."""
    if not (run / "status.json").exists():
        return False
    status = read_status(run)
    assert status["state"] == "running", status
    return bool(status["phase"] == "search" and status["done"] > 2 and status.get("evaluations_per_s"))


# --- what is refused before anything is sent ------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs submit in a process of its own, which must refuse within seconds, and returns its message."""
    (tmp_path / "run.yaml").write_text("target: 0.5\n")

    def run(*arguments: str, **variables: str) -> str:
        environment = without_cluster() | variables
        command = Command(["submit", "run.yaml", "--runs-dir", "/shared", *arguments], tmp_path, environment)
        out, err = command.communicate(timeout=30)
        assert (command.returncode, out) == (2, ""), err
        (message,) = err.splitlines()
        return message

    return run


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_nobody_answers(refused: Callable[..., str], nobody: str) -> None:
    message = refused("--address", f"http://me:hunter2@{nobody}")
    assert message.startswith(f"error: address: no Ray dashboard answers at http://{nobody} (")
    assert "hunter2" not in message
    assert f"http://{nobody}" in refused(RAY_API_SERVER_ADDRESS=f"http://{nobody}")


def test_what_is_named_goes_before_the_environment(refused: Callable[..., str], nobody: str) -> None:
    message = refused("--address", nobody, RAY_API_SERVER_ADDRESS="http://other.invalid", RAY_ADDRESS="other.invalid:1")
    assert nobody in message


def test_no_dashboard(refused: Callable[..., str]) -> None:
    assert "jobs are sent to the dashboard, such as http://HEAD:8265" in refused("--address", "ray://head:10001")


def test_places_that_would_be_lost(refused: Callable[..., str]) -> None:
    assert "runs_dir: runs is relative" in refused("--runs-dir", "runs")


@pytest.mark.parametrize("run", [run_search, run_comparison])
def test_in_a_job_runs_lie_elsewhere_than_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[RunConfig], Any]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"relative to the job's working folder.* with --runs-dir"):
        run(RunConfig(workers=0))
    assert not list(tmp_path.iterdir())


# --- the manifest ---------------------------------------------------------------------------------------------


def test_the_manifest_of_kuberay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run file is one of ours, its command what submit sends, and its pods share the folder of runs."""
    settings, job = yaml.safe_load_all(MANIFEST.read_text())
    assert (settings["kind"], job["apiVersion"], job["kind"]) == ("ConfigMap", "ray.io/v1", "RayJob")
    config = validate(yaml.safe_load(settings["data"]["run.yaml"]))
    assert config.runs_dir.is_absolute()
    spec = job["spec"]
    python, flag, package, verb, file, *options = shlex.split(spec["entrypoint"])
    assert [python, flag, package, verb, Path(file).name, *options] == COMMAND.split()
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert variables["OMP_NUM_THREADS"] == str(config.threads)

    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    head, worker = (group["template"]["spec"] for group in (cluster["headGroupSpec"], workers))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    cpus = sum(int(container["resources"]["limits"]["cpu"]) for container in worker["containers"])
    assert workers["replicas"] * cpus >= config.workers * config.threads
    images = {container["image"] for pod in (head, worker) for container in pod["containers"]}
    assert len(images) == 1
    for pod in (head, worker):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        (shared,) = (volume for path, volume in mounts.items() if config.runs_dir.is_relative_to(path))
        assert shared["persistentVolumeClaim"]["claimName"] == "allocator-runs"
    (mounted,) = (m for m in head["containers"][0]["volumeMounts"] if Path(file).is_relative_to(m["mountPath"]))
    assert {v["name"]: v for v in head["volumes"]}[mounted["name"]]["configMap"]["name"] == settings["metadata"]["name"]
    assert f"rayproject/ray:{cluster['rayVersion']}" in MANIFEST.read_text()
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    relative = MANIFEST.relative_to(ROOT).as_posix()
    assert f"kubectl apply -f {relative}" in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
