"""Every target keeps the contract: it refuses what it cannot express, and what it leaves can be verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Python
from safetensors.torch import load_file, save_file

import allocator as api
from allocator.core.errors import UserError
from allocator.interop.contract import Source
from allocator.interop.matrices import list_matrices
from allocator.interop.targets.registry import TARGETS
from allocator.interop.verification import PLANNED, VERIFY, write_verify
from allocator.testing import TargetContract
from allocator.testing.suites import make_suites
from allocator.testing.targets import PATTERNS, expresses, read_export

Verify = Callable[[Path, Path], tuple[int, dict[str, Any]]]


def targets_table() -> str:
    """Return the table of targets in docs/other-tools.md, whose rows the tests of this folder prove."""
    lines = ["| `--to` | what is written | plans |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{t.name}` | {t.writes} | {', '.join(t.patterns)} |" for t in TARGETS.values()])


def test_the_page_lists_the_targets() -> None:
    page = Path(__file__).parents[2] / "docs" / "other-tools.md"
    assert targets_table() in page.read_text(encoding="utf-8")


class ExportContract(TargetContract):
    """The contract through the verb, on plans that the verb ``prune`` executed; also for a run."""

    @pytest.fixture
    def sources(self, by_pattern: dict[str, Any]) -> dict[str, Source]:
        return {pattern: executed.source for pattern, executed in by_pattern.items()}

    def export(self, source: Source, out: Path) -> list[str]:
        folder = source.run or (source.executed or out).parent
        return api.export(folder, self.target.name, out, model=source.checkpoint.folder)

    def test_a_run_is_written_the_same_again(self, searched: Path, structured: Any, tmp_path: Path) -> None:
        source = replace(structured, folder=searched).source
        if not expresses(self.target, replace(source, run=searched)):
            pytest.skip("cannot be expressed here")
        for name in ("one", "two"):
            self.export(replace(source, run=searched), tmp_path / name)
        one, two = (read_export(tmp_path / name, self.target.varies) for name in ("one", "two"))
        assert one == two


globals().update(make_suites(ExportContract, {name: {"target": target} for name, target in TARGETS.items()}))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "kind",
    [
        "gpt2",
        "phi3",
        "mixtral",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt_neox", "falcon", "starcoder2", "deepseek_v3")),
    ],
)
def test_other_families_are_written_or_refused(
    kind: str,
    pattern: str,
    make_model: Callable[..., Path],
    execute: Callable[..., Any],
    verify: Verify,
    tmp_path: Path,
) -> None:
    """Matrices of several parts, matrices that lie inputs first, and configurations with keys of their own."""
    executed = execute(make_model(kind), pattern)
    write_verify(tmp_path, executed.source)
    code, said = verify(tmp_path, executed.checkpoint)
    assert (code, said["wrong"]) == (0, {})
    written = []
    for target in TARGETS.values():
        if expresses(target, executed.source):
            api.export(executed.folder, target.name, tmp_path / target.name, model=executed.model)
            written.append(target.name)
    assert {"hf", "ratios"} <= {*written}


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("gpt2", "structured"),
        ("phi3", "structured"),
        ("gpt2", "unstructured"),
        ("mixtral", "structured"),
        ("mixtral", "n:m"),
    ],
)
def test_what_other_families_are_refused_is_one_line(
    kind: str, pattern: str, make_model: Callable[..., Path], execute: Callable[..., Any], tmp_path: Path
) -> None:
    """With what to do; nothing is written."""
    executed, refused = execute(make_model(kind), pattern), set()
    for target in TARGETS.values():
        if pattern in target.patterns and not expresses(target, executed.source):
            with pytest.raises(
                UserError, match=r"^export: [^\n]+(Use --to|See 'allocator export --list'|Name the folder)"
            ):
                api.export(executed.folder, target.name, tmp_path / "out", model=executed.model)
            refused.add(target.name)
    assert not list(tmp_path.iterdir())
    trackers = {"optuna", "mlflow"}
    expected = {
        ("gpt2", "structured"): {"hf-padded", "torch-pruning", "tyr", "darwinlm"},
        ("phi3", "structured"): {"torch-pruning"},
        ("mixtral", "structured"): {"hf-padded", "torch-pruning", "tyr", "darwinlm"},
        ("mixtral", "n:m"): {"llm-compressor", "torchao"},
        ("gpt2", "unstructured"): {"llm-compressor", "torchao", "evopress"},
    }
    assert refused == expected[kind, pattern] | trackers


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_executed_plan_is_as_planned(
    pattern: str, by_pattern: dict[str, Any], verify: Verify, tmp_path: Path
) -> None:
    executed = by_pattern[pattern]
    write_verify(tmp_path, executed.source)
    code, said = verify(tmp_path, executed.checkpoint)
    assert (code, said["wrong"]) == (0, {})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_dense_model_is_not(pattern: str, by_pattern: dict[str, Any], verify: Verify, tmp_path: Path) -> None:
    executed = by_pattern[pattern]
    write_verify(tmp_path, executed.source)
    code, said = verify(tmp_path, executed.model)
    assert code == 1
    assert said["wrong"].keys() == {m.module for m in executed.source.matrices if m.kept < m.size}


def test_zeros_that_are_in_the_wrong_groups_are_seen(n_m: Any, verify: Verify, tmp_path: Path) -> None:
    write_verify(tmp_path, n_m.source)
    tensors = load_file(n_m.checkpoint / "model.safetensors")
    odd = next(m for m in n_m.source.matrices if m.group)
    weight = torch.ones(odd.shape)
    weight.view(-1)[: odd.zeros] = 0
    save_file(tensors | {f"{odd.module}.weight": weight}, tmp_path / "model.safetensors")
    code, said = verify(tmp_path, tmp_path)
    assert (code, [*said["wrong"]]) == (1, [odd.module])
    assert "keeps 4 of 4" in said["wrong"][odd.module]


def test_a_sub_block_that_is_gone_must_be_gone(structured: Any, verify: Verify, tmp_path: Path) -> None:
    write_verify(tmp_path, structured.source)
    gone = next(m for m in structured.source.matrices if not m.kept)
    assert json.loads((tmp_path / PLANNED).read_text())["modules"][gone.module]["shape"] is None
    tensors = load_file(structured.checkpoint / "model.safetensors")
    save_file(tensors | {f"{gone.module}.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    code, said = verify(tmp_path, tmp_path)
    assert (code, said["wrong"]) == (1, {gone.module: "is there, and should be gone"})


def test_the_command_is_run_as_it_says(structured: Any, tmp_path: Path) -> None:
    """In a process of its own, which ends with 0 or 1."""
    write_verify(tmp_path, structured.source)
    for folder, code in ((structured.checkpoint, 0), (structured.model, 1)):
        done = Python([tmp_path / VERIFY, folder], Path("/"))
        out, err = done.communicate()
        assert done.returncode == code, err
        assert "matrices are as planned" in out


@pytest.mark.parametrize("name", ["structured", "query_heads", "unstructured", "n_m"])
def test_matrices_add_up_to_the_plan(name: str, request: pytest.FixtureRequest) -> None:
    executed: Any = request.getfixturevalue(name)
    plan, found = executed.plan, list_matrices(executed.plan, executed.files, executed.layout)
    units = {unit.name: (unit, level) for unit, level in zip(plan.space.units, plan.allocation, strict=True)}
    assert [*dict.fromkeys(m.unit for m in found)] == [*units]
    shapes = {name.removesuffix(".weight"): shape for name, shape in executed.files.shapes.items() if len(shape) == 2}
    assert {m.module: m.shape for m in found}.items() <= shapes.items()
    for unit, level in units.values():
        own = [m for m in found if m.unit == unit.name]
        assert sum(m.kept for m in own) == unit.params[level] - (unit.params[0] - sum(m.size for m in own)) * bool(
            unit.params[level]
        )


def test_bad_input_changes_nothing(unstructured: Any, tiny_qwen2: Path, tmp_path: Path) -> None:
    folder, model = unstructured.folder, unstructured.model
    with pytest.raises(UserError, match="unknown target 'ratio'; did you mean 'ratios'"):
        api.export(folder, "ratio", tmp_path / "out", model=model)
    with pytest.raises(UserError, match="is another model"):
        api.export(folder, "ratios", tmp_path / "out", model=tiny_qwen2)
    with pytest.raises(UserError, match="no such plan"):
        api.export(tmp_path, "ratios", tmp_path / "out", model=model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="exists already"):
        api.export(folder, "ratios", tmp_path, model=model)
    assert not list(tmp_path.iterdir())
