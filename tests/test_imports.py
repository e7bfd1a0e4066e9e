"""Imports only go down, and heavy packages stay where they belong."""

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import allocator

ROOT = Path(allocator.__file__).parent
LOWER = {"core", "searchers", "model", "pruning", "evaluation"}
ALLOWED = {
    "core": {"core"},
    "searchers": {"core", "searchers"},
    "model": {"core", "model"},
    "report": {"core", "report"},
    "pruning": {"core", "model", "pruning"},
    "evaluation": {"core", "model", "pruning", "evaluation"},
    "pool": {"core", "model", "pruning", "evaluation", "pool"},
    "interop": {"core", "model", "pruning", "interop"},
    "run": {*LOWER, "run"},
    "commands": {*LOWER, "pool", "interop", "report", "run", "commands"},
    "testing": {*LOWER, "pool", "interop", "run", "testing"},
    "cli": {"core", "model", "interop", "pool", "run", "report", "commands"},
    "__main__": {"cli"},
    "__init__": {"core", "commands", "run"},
}
"""What a package, or a file at the root, imports of ours."""

HOMES = {
    "ray": {"pool"},
    "transformers": {"model", "interop", "testing"},
    "pymoo": {"searchers"},
    "optuna": {"searchers", "interop"},
    "mlflow": {"interop"},
    "pytest": {"testing"},
    "hypothesis": {"testing"},
}
NO_TORCH = {"core", "searchers", "report", "cli", "__init__", "__main__"}
MODULES = sorted(ROOT.rglob("*.py"))


def _name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports(path):
    return set(_imported(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def _package(path):
    relative = path.relative_to(ROOT).parts
    return relative[0].removesuffix(".py")


def test_every_package_has_a_rule():
    assert {_package(path) for path in MODULES} - {"packaged"} == ALLOWED.keys()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_package_imports_only_what_lies_below_it(path):
    own = {name for name in _imports(path) if name.split(".")[0] == "allocator"}
    assert "allocator" not in own, "packages name the module that they need"
    assert {name.split(".")[1] for name in own} <= ALLOWED[_package(path)]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_heavy_packages_are_imported_only_where_they_belong(path):
    found = {name.split(".")[0] for name in _imports(path)}
    for package, homes in HOMES.items():
        assert package not in found or _package(path) in homes
    assert "torch" not in found or _package(path) not in NO_TORCH


@pytest.mark.parametrize("name", ["cli", "commands.open_run", "commands.report", "commands.submit", "run.status"])
def test_what_reads_a_run_loads_no_model(name):
    """Or each look at a run would wait for torch."""
    script = f"import sys, allocator.{name}; print(sorted({{'torch', 'transformers', 'ray'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_there_is_no_cycle():
    names = {_name(path) for path in MODULES} - {"allocator"}
    graph = {_name(path): _imports(path) & names - {_name(path)} for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_module_is_imported_in_both_ways(path):
    name = _name(path)
    if name == "allocator.__main__" or ".scripts." in name:
        pytest.skip("runs when it is imported")
    parent, _, last = name.rpartition(".")
    scope = {}
    exec(f"import {name} as whole", scope)
    if parent:
        exec(f"from {parent} import {last} as part", scope)
        assert scope["part"] is scope["whole"]
    assert inspect.ismodule(scope["whole"])
