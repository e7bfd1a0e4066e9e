"""The examples run as they are, are short, and pass the contract suites that the package ships."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from forked import Python

import allocator
from allocator.testing import PrunerContract, SearcherContract

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("own_searcher", "own_pruner", "from_python")
MAX_LINES = 60
DEADLINE_S = 300.0


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class TestOwnSearcher(SearcherContract):
    settings = load("own_searcher").HillClimbing(tokens=128)


class TestOwnPruner(PrunerContract):
    pruner = load("own_pruner").Ria()


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < MAX_LINES


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_as_it_is(name: str, tmp_path: Path) -> None:
    process = Python([EXAMPLES / f"{name}.py"], tmp_path)
    _, error = process.communicate(DEADLINE_S)
    assert process.returncode == 0, error
    (run,) = (tmp_path / "runs").iterdir()
    figures = allocator.open_run(run).figures
    assert figures["dense"]["kl"] == 0
    assert figures["searched"]["params"] <= allocator.open_run(run).plan().budget.limits["params"]
    assert "kl" in figures["uniform"]


def test_the_family_serves_the_packaged_model() -> None:
    space, _ = allocator.inspect(family=EXAMPLES / "own_family.yaml")
    assert space == allocator.inspect().space
