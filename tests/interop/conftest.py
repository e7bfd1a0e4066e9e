"""Executed plans of every pattern, made without a search, and the environments of other tools."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import allocator as api
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome, Request
from allocator.interop.contract import Source
from allocator.interop.verification import VERIFY
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.run.config.load import load_config
from allocator.run.prepare import prepare_job

ENVIRONMENTS = Path(__file__).parents[2] / ".consumers"


@pytest.fixture(scope="session")
def consumer() -> Callable[..., str]:
    """Runs a command of another tool's environment in a folder: ``consumer("torch", folder, "python", "apply.py")``."""

    def run(name: str, folder: Path, program: str, *arguments: object) -> str:
        programs = ENVIRONMENTS / name / "bin"
        assert programs.is_dir(), f"{programs} is missing: run 'make test-consumers'"
        command = [programs / program, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.fixture
def verify(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path, Path], tuple[int, dict[str, Any]]]:
    """Runs the command that an export left on a checkpoint, in this process; returns its exit code and what it says."""

    def run(folder: Path, checkpoint: Path) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [VERIFY, str(checkpoint), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(folder / VERIFY), run_name="__main__")
        return int(end.value.code or 0), json.loads(capsys.readouterr().out)

    return run


RELOAD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "allocator":
            raise ImportError("allocator is not installed here")

dtype, absent, tokens, out, *folders = sys.argv[1:]
if absent == "absent":
    sys.meta_path.insert(0, Absent())
try:
    import allocator
except ImportError:
    assert absent == "absent"
else:
    assert absent == "there"
import numpy as np
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
tokens = torch.from_numpy(np.load(tokens))
for number, folder in enumerate(folders):
    remote = (Path(folder) / "modeling_pruned.py").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        written = [
            model.generate(tokens[:, :8], max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        logits = model(tokens, use_cache=False).logits
    np.savez(
        Path(out) / f"{number}.npz",
        logits=logits.numpy(),
        cached=written[0].numpy(),
        uncached=written[1].numpy(),
        params=sum(p.numel() for p in {p.data_ptr(): p for p in model.parameters()}.values()),
        name=type(model).__name__,
    )
"""


@pytest.fixture(scope="session")
def reload(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Loads checkpoints in a process that has this package or not, and returns what each gave.

    ``reload(folders, dtype="float64", package="there")``; remote code is trusted where there is a modelling file.
    """

    def run(folders: list[Path], dtype: str = "float32", package: str = "absent") -> list[Any]:
        out = tmp_path_factory.mktemp("reloaded")
        np.save(out / "tokens.npy", np.random.default_rng(0).integers(1, 100, (2, 24)))
        isolated = ["-I"] if package == "absent" else []
        here = {"PYTHONPATH": str(ENVIRONMENTS.parent)} if package == "there" else {}
        done = subprocess.run(
            [sys.executable, *isolated, "-c", RELOAD, dtype, package, out / "tokens.npy", out, *folders],
            env={**os.environ, "HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1", **here},
            cwd=out,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [np.load(out / f"{number}.npz") for number in range(len(folders))]

    return run


@dataclass(frozen=True)
class Executed:
    """A plan in a folder, with its checkpoint beside it.

    Attributes:
        model: The dense model.
        folder: Holds ``plan.json`` and ``checkpoint``.
    """

    model: Path
    folder: Path
    files: Checkpoint
    layout: Layout

    @property
    def plan(self) -> Plan:
        return Plan.load(self.folder / "plan.json")

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def source(self) -> Source:
        return Source(plan=self.plan, checkpoint=self.files, layout=self.layout, executed=self.checkpoint)


@pytest.fixture(scope="session")
def execute(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Callable[..., Executed]:
    """Executes an uneven plan: ``execute(model, "structured", ["ladder.attention=query_heads"], first=1)``.

    Unit i is at level i modulo the length of its ladder, from ``first`` on, so that every level comes up; or units are
    at ``levels``.
    """

    def make(
        model: Path,
        pattern: str,
        assignments: list[str] | None = None,
        first: int = 0,
        levels: tuple[int, ...] | None = None,
    ) -> Executed:
        flags = {"model": str(model), "text": text_folder, "pattern": pattern, "workers": 0}
        sizes = "tokens.sequence_length=64 tokens.calibration=1024 tokens.selection=64 tokens.test=64"
        config = load_config(None, flags, [*sizes.split(), "search.tokens=[64]", *(assignments or ())])
        job = prepare_job(config)
        levels = levels or tuple((first + i) % unit.num_levels for i, unit in enumerate(job.space.units))
        folder = tmp_path_factory.mktemp("executed")
        plan = Plan(
            model=job.model_id,
            space=job.space,
            allocation=levels,
            budget=type(job.budget)(params=job.space.cost(levels)),
            pruner=job.pruner_id,
            measured={},
            provenance={"run": job.model_id["fingerprint"], "searcher": "by hand", "seed": 0, "versions": {}},
        )
        plan.save(folder / "plan.json")
        api.prune(plan, folder / "checkpoint", model=model, text=text_folder)
        return Executed(model, folder, job.checkpoint, job.layout)

    return make


@pytest.fixture(scope="session")
def structured(execute: Callable[..., Executed], tiny_model: Path) -> Executed:
    """Channels and KV groups, some sub-blocks gone."""
    return execute(tiny_model, "structured")


@pytest.fixture(scope="session")
def query_heads(execute: Callable[..., Executed], tiny_model: Path) -> Executed:
    """Channels and query heads."""
    return execute(tiny_model, "structured", ["ladder.attention=query_heads"], first=1)


@pytest.fixture(scope="session")
def unstructured(execute: Callable[..., Executed], tiny_model: Path) -> Executed:
    """Single weights, from dense to four fifths."""
    return execute(tiny_model, "unstructured")


@pytest.fixture(scope="session")
def n_m(execute: Callable[..., Executed], tiny_model: Path) -> Executed:
    """Matrices that are dense, 2:4 or 1:4."""
    return execute(tiny_model, "n:m")


@pytest.fixture(scope="session")
def searched(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a search of a front, of which one allocation could not be measured. Read only."""
    settings = (
        "tokens.sequence_length=64 tokens.calibration=512 tokens.selection=256 tokens.test=512 search.tokens=[64,128] "
        "search.nsga.generations=3 search.nsga.population=8 search.nsga.profile=64 search.nsga.tokens=128"
    ).split()
    where = {"runs_dir": tmp_path_factory.mktemp("runs"), "name": "searched", "text": text_folder, "workers": 0}
    folder = api.search(tiny_model, objectives=["params"], method="nsga2", settings=settings, **where).folder
    with Journal.resume(folder / "journal.jsonl") as journal:
        journal.append(
            Outcome(
                request=Request(allocation=journal.space.sparsest, tokens=64),
                measured={},
                wall_s=1.5,
                loss_name=journal.loss,
                failed="3 workers died",
            ),
            99,
        )
    return folder


@pytest.fixture(scope="session")
def by_pattern(structured: Executed, unstructured: Executed, n_m: Executed) -> dict[str, Executed]:
    """One plan of each pattern."""
    return {"structured": structured, "unstructured": unstructured, "n:m": n_m}
