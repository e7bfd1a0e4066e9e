from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Python
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import allocator as api
from allocator.interop.matrices import round_share_up


@given(st.integers(1, 10**12), st.integers(1, 16384), st.data())
def test_a_share_is_whole_again_for_who_rounds_down(rows: int, columns: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, columns))
    level = round_share_up(rows * part, rows * columns)
    assert 0 <= level <= 1
    for whole, wanted in ((columns, part), (rows * columns, rows * part)):
        assert int(whole * level) == round(whole * level) == wanted


def export(executed: Any, folder: Path) -> list[dict[str, Any]]:
    api.export(executed.folder, "torchao", folder, model=executed.model)
    entries: list[dict[str, Any]] = json.loads((folder / "sparsifier.json").read_text())
    return entries


def local(folder: Path, *arguments: object) -> str:
    done = Python(arguments, folder)
    out, err = done.communicate()
    assert done.returncode == 0, f"{out[-2000:]}\n{err[-2000:]}"
    return out


@pytest.fixture(scope="module")
def whole(execute: Callable[..., Any], tiny_model_bf16: Path) -> Any:
    """A plan of which some matrices lose everything, in bfloat16."""
    return execute(tiny_model_bf16, "unstructured", ["ladder.sparsities=[0.2, 0.45, 1.0]"])


@pytest.mark.parametrize("name", ["unstructured", "n_m", "whole"])
def test_torch_zeroes_as_planned(
    name: str, request: pytest.FixtureRequest, verify: Callable[..., Any], tmp_path: Path
) -> None:
    executed: Any = request.getfixturevalue(name)
    folder, out = tmp_path / "export", tmp_path / "out"
    export(executed, folder)
    local(folder, "apply.py", executed.model, out)
    made = verify(folder, out)[1]["modules"]
    assert all(row["achieved"] == row["planned"] for row in made.values())
    dense, pruned = (load_file(path / "model.safetensors") for path in (executed.model, out))
    assert dense.keys() == pruned.keys()
    by_name = {f"{m.module}.weight": m for m in executed.source.matrices}
    for key, tensor in dense.items():
        stays = pruned[key] != 0
        assert pruned[key].dtype == tensor.dtype
        assert torch.equal(pruned[key], torch.where(stays, tensor, 0)), "what stays is as it was"
        if key in by_name:
            run = by_name[key].group[1] if by_name[key].group else tensor.numel()
            gone = torch.where(stays, 0, tensor.abs()).reshape(-1, run).amax(1)
            assert (gone <= torch.where(stays, tensor.abs(), torch.inf).reshape(-1, run).amin(1)).all()
        else:
            assert stays.all(), key


def test_entries_name_each_setting_that_has_a_default(unstructured: Any, n_m: Any, tmp_path: Path) -> None:
    for executed, name in ((unstructured, "one"), (n_m, "two")):
        entries = export(executed, tmp_path / name)
        pruned = [f"{m.module}.weight" for m in executed.source.matrices if m.sparsity]
        assert [entry["tensor_fqn"] for entry in entries] == pruned, "dense ones have no entry"
        assert all({"sparsity_level", "sparse_block_shape", "zeros_per_block"} < entry.keys() for entry in entries)
        for entry in entries:
            rows, columns = entry["sparse_block_shape"]
            assert rows == 1
            assert (columns == 4) == (entry["sparsity_level"] == 1.0)
            assert entry.get("semi_structured_block_size") == (4 if entry["zeros_per_block"] == 2 else None)


@pytest.mark.consumers
@pytest.mark.parametrize("name", ["unstructured", "halves", "whole"])
def test_wanda_of_torchao_zeroes_as_planned(
    name: str,
    consumer: Callable[..., str],
    execute: Callable[..., Any],
    tiny_model: Path,
    text_folder: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    executed: Any = (
        execute(tiny_model, "n:m", ['ladder.patterns=["2:4"]']) if name == "halves" else request.getfixturevalue(name)
    )
    folder, out = tmp_path / "export", tmp_path / "out"
    export(executed, folder)
    wanda = ["--wanda", text_folder, "--samples", 8, "--length", 64]
    consumer("torch", folder, "python", "apply.py", executed.model, out, *wanda)
    made = json.loads(consumer("torch", folder, "python", "verify.py", out, "--json"))["modules"]
    assert all(row["achieved"] == row["planned"] for row in made.values())
    assert any(row["achieved"] for row in made.values())
    dense, pruned = (load_file(path / "model.safetensors") for path in (executed.model, out))
    assert dense.keys() == pruned.keys(), "observers are no part of a checkpoint"
    consumer("torch", folder, "python", "apply.py", executed.model, tmp_path / "by magnitude")
    other = load_file(tmp_path / "by magnitude" / "model.safetensors")
    assert any(not torch.equal(other[key], pruned[key]) for key in other), "inputs count"


@pytest.mark.consumers
def test_wanda_of_torchao_is_not_asked_for_other_groups_than_halves(
    consumer: Callable[..., str], n_m: Any, text_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    lines = api.export(n_m.folder, "torchao", folder, model=n_m.model)
    assert "not by Wanda" in lines[0]
    wanda = ["--wanda", text_folder, "--samples", 1, "--length", 8]
    with pytest.raises(AssertionError, match=r"not 3 of 4\. Leave --wanda out"):
        consumer("torch", folder, "python", "apply.py", n_m.model, tmp_path / "out", *wanda)
    assert not (tmp_path / "out").exists()
