"""Level text, read back as EvoPress, Týr-the-Pruner and DarwinLM read it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from allocator.core.errors import UserError
from allocator.interop.contract import check_target
from allocator.interop.levels import apportion
from allocator.interop.targets.darwinlm import DarwinLM
from allocator.interop.targets.evopress import EvoPress
from allocator.interop.targets.tyr import Tyr


def loaded(folder: Path) -> dict[str, int]:
    """Read levels as the peers' loaders do, which know no more than this."""
    levels = {}
    with (folder / "levels.txt").open() as file:
        for line in file:
            name, level = line.split(":")
            assert name == name.strip()
            levels[name] = int(level)
    return levels


def metadata(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "metadata.pth", weights_only=True)


def masked(executed: Any, folder: Path, sparsities: dict[str, float], widths: dict[str, int]) -> Path:
    """Zero the smallest weights of matrices, or of those with a width the smallest runs of so many columns."""
    tensors = load_file(executed.model / "model.safetensors")
    for module, sparsity in sparsities.items():
        weight = tensors[f"{module}.weight"]
        runs = weight.T.reshape(weight.shape[1] // widths[module], -1) if module in widths else weight.reshape(-1, 1)
        runs = runs.clone()
        runs[runs.abs().sum(1).argsort(stable=True)[: round(len(runs) * sparsity)]] = 0
        made = runs.reshape(weight.T.shape).T if module in widths else runs.reshape(weight.shape)
        tensors[f"{module}.weight"] = made.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@given(data=st.data())
def test_levels_are_the_nearest_of_their_sum(data: st.DataObject) -> None:
    limits = data.draw(st.lists(st.tuples(st.integers(-3, 0), st.integers(0, 3)), min_size=1, max_size=4))
    wanted = [data.draw(st.floats(low - 1, high + 1)) for low, high in limits]
    total = data.draw(st.integers(sum(low for low, _ in limits), sum(high for _, high in limits)))
    levels = apportion(wanted, limits, total)
    assert sum(levels) == total
    assert all(low <= level <= high for level, (low, high) in zip(levels, limits, strict=True))

    def error(found: Any) -> float:
        return sum(abs(a - b) for a, b in zip(found, wanted, strict=True))

    every = itertools.product(*(range(low, high + 1) for low, high in limits))
    assert error(levels) <= min(error(each) for each in every if sum(each) == total) + 1e-9


def test_evopress_reads_what_is_written(unstructured: Any, verify: Callable[..., Any], tmp_path: Path) -> None:
    lines = EvoPress().write(unstructured.source, tmp_path)
    levels, meta = loaded(tmp_path), metadata(tmp_path)
    sizes = {m.module: m.size for m in unstructured.source.matrices}
    plan = {m.module: m.sparsity for m in unstructured.source.matrices}
    assert [*levels] == sorted(sizes)
    assert sum(levels.values()) == 0
    assert len(set(levels.values())) > 4
    base, step, most = meta["sparsity"], meta["weights_diff"], meta["num_levels"]
    assert base == pytest.approx(1 - sum(m.kept for m in unstructured.source.matrices) / sum(sizes.values()))
    given = {}
    for module, level in levels.items():  # what prune.py makes of each matrix
        lowest = min(int(base // (step / sizes[module])), most)
        highest = min(int((1 - base) // (step / sizes[module])), most)
        assert -lowest <= level <= highest
        given[module] = base + level * step / sizes[module]
    worst = max(abs(given[m] - plan[m]) for m in plan)
    assert f"up to {worst:.4f}" in lines[0]
    assert f"{sum(abs(given[m] - plan[m]) for m in plan) / len(plan):.4f} on average" in lines[0]
    # no module errs by more than what its smallest matrix's step, the clamp and the moves to the sum come to
    assert worst <= 1.5 * step / min(sizes.values())
    assert f"{sum(m.kept for m in unstructured.source.matrices):,} by the plan" in lines[1]
    assert verify(tmp_path, masked(unstructured, tmp_path / "made", given, {}))[1]["wrong"] == {}
    assert verify(tmp_path, unstructured.checkpoint)[1]["wrong"]


def test_tyr_takes_a_plan_over_exactly(structured: Any, tmp_path: Path) -> None:
    lines = Tyr().write(structured.source, tmp_path)
    levels, meta = loaded(tmp_path), metadata(tmp_path)
    layers, heads, width = 3, 4, 48
    assert set(levels.values()) == {0}
    assert [*levels] == sorted(levels)
    units = dict(zip((u.name for u in structured.plan.space.units), structured.plan.allocation, strict=True))
    for name, key, count, step in (
        ("self_attn.o_proj", "mha_sparsity", heads, "weights_diff_mha"),
        ("mlp.down_proj", "ffn_sparsity", width, "weights_diff_mlp"),
    ):
        for layer in range(layers):
            module = f"model.layers.{layer}.{name}"
            size = 32 * (width if "mlp" in name else 32)
            sparsity = (meta[key][layer] * size + levels[module] * meta[step]) / size  # as the next iteration has it
            unit = next(u for u in structured.plan.space.units if module.startswith(u.name))
            kept = unit.kept[units[unit.name]] * (count // unit.total)
            assert int(count * (1 - sparsity)) == kept
            assert (sparsity == 1.0) == (kept == 0)
            assert (sparsity == 0.0) == (kept == count)
    assert "up to 0.000" in lines[0]


@given(total=st.integers(1, 60_000), data=st.data())
def test_tyr_keeps_whole_items(total: int, data: st.DataObject) -> None:
    from allocator.interop.targets.tyr import _sparsity

    kept, rows = data.draw(st.integers(0, total)), data.draw(st.integers(1, 8192))
    sparsity = (_sparsity(kept, total) * (total * rows) + 0 * rows) / (total * rows)
    assert int(total * (1 - sparsity)) == kept


@pytest.mark.parametrize("name", ["structured", "query_heads"])
def test_darwinlm_reads_what_is_written(
    name: str, request: pytest.FixtureRequest, verify: Callable[..., Any], tmp_path: Path
) -> None:
    executed: Any = request.getfixturevalue(name)
    lines = DarwinLM().write(executed.source, tmp_path)
    levels, meta = loaded(tmp_path), metadata(tmp_path)
    plan = {m.module: m.sparsity for m in executed.source.matrices}
    assert [*levels] == [f"model.layers.{i}.{n}" for n in ("mlp.down_proj", "self_attn.o_proj") for i in range(3)]
    attention, mlp = meta["cols_removed_attn"], meta["cols_removed_mlp"]
    assert attention == [0, 8, 16, 24, 32]
    assert mlp == [0, 12, 24, 36, 48]
    given = {
        module: (mlp[level] / 48 if "mlp" in module else attention[level] / 32) for module, level in levels.items()
    }
    for module, level in levels.items():
        if "o_proj" in module:
            assert given[module] == pytest.approx(plan[module])
        else:
            assert abs(level - plan[module] * 4) < 1
    channels = [module for module in levels if "mlp" in module]
    assert abs(sum(levels[m] for m in channels) - 4 * sum(plan[m] for m in channels)) <= 0.5
    assert f"up to {max(abs(given[m] - plan[m]) for m in levels):.4f}" in lines[0]
    widths = {module: 1 if "mlp" in module else 8 for module in levels}
    assert verify(tmp_path, masked(executed, tmp_path / "made", given, widths))[1]["wrong"] == {}


@pytest.mark.parametrize("target", [Tyr(), DarwinLM()], ids=["tyr", "darwinlm"])
def test_levels_have_what_the_peer_writes_itself(target: Any, structured: Any, tmp_path: Path) -> None:
    keys = {
        "tyr": "sparsity mha_sparsity ffn_sparsity weights_diff_mlp weights_diff_mha num_sparsity_levels",
        "darwinlm": "cols_removed_attn cols_removed_mlp",
    }
    target.write(structured.source, tmp_path)
    assert metadata(tmp_path).keys() == set(keys[target.name].split())
    assert "levels.txt" in (tmp_path / "README.txt").read_text()


def test_models_that_a_peer_does_not_know_are_refused(
    execute: Callable[..., Any], tiny_qwen2: Path, make_model: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=r"Týr takes models of type llama.*'qwen2'"):
        check_target(Tyr(), execute(tiny_qwen2, "structured").source)
    wide = execute(make_model("llama", head_dim=16), "structured")
    with pytest.raises(UserError, match=r"hidden_size / 4.*\[32, 64\]"):
        check_target(DarwinLM(), wide.source)
