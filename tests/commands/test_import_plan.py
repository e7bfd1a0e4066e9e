"""Other tools' allocations, as plans."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allocator as api
from allocator.core.errors import UserError
from allocator.core.plan import Plan
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.live.write import count_params

SETTINGS = ["tokens.sequence_length=64", "tokens.calibration=1024", "tokens.selection=64", "tokens.test=64"]
SETTINGS += ["search.tokens=[64]"]
OUTPUTS = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")]


@pytest.fixture
def take(tiny_model: Path, text_folder: Path) -> Callable[..., tuple[Plan, list[str]]]:
    """Imports a file: ``take(path, "structured", "ladder.align=2")``."""

    def run(path: Path, pattern: str = "structured", *settings: str, **more: Any) -> tuple[Plan, list[str]]:
        where = {"model": tiny_model, "text": text_folder, "pattern": pattern}
        return api.import_plan(path, settings=[*SETTINGS, *settings], **where, **more)

    return run


@pytest.fixture
def hand(take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Makes an uneven plan of a pattern, and exports it; the folder holds the plan as ``plan.json``."""

    def run(pattern: str, target: str, *settings: str) -> Path:
        modules, shares = OUTPUTS, [0.0, 0.25, 0.5, 0.75, 1.0, 0.5]
        if pattern != "structured":
            inner = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
            modules = [*OUTPUTS, *(f"model.layers.{i}.{name}" for i in range(3) for name in inner)]
            shares = [0.0, 0.5, 0.75] if pattern == "n:m" else [0.0, 0.3, 0.55, 0.7]
        given = tmp_path / "given.json"
        given.write_text(json.dumps(dict(zip(modules, itertools.cycle(shares), strict=False))))
        plan, _ = take(given, pattern, *settings)
        plan.save(tmp_path / "plan.json")
        api.export(tmp_path / "plan.json", target, tmp_path / "out", model=tiny_model)
        return tmp_path

    return run


def kept(plan: Plan) -> dict[str, int]:
    return {unit.name: unit.kept[level] for unit, level in zip(plan.space.units, plan.allocation, strict=True)}


@pytest.mark.parametrize("file", ["ratios.json", "modules.csv"])
@pytest.mark.parametrize(
    ("pattern", "setting"),
    [
        ("structured", "pruner.bias=false"),
        ("structured", "ladder.attention=query_heads"),
        ("unstructured", "pruner.name=wanda"),
        ("n:m", "pruner.name=magnitude"),
    ],
)
def test_ratios_come_back_as_they_went(
    pattern: str, setting: str, file: str, hand: Callable[..., Path], take: Callable[..., tuple[Plan, list[str]]]
) -> None:
    folder = hand(pattern, "ratios", setting)
    before = Plan.load(folder / "plan.json")
    after, lines = take(folder / "out" / file, pattern, setting)
    assert kept(after) == kept(before)
    assert len(set(kept(after).values())) > 3
    assert after.space.cost(after.allocation) == before.space.cost(before.allocation) == after.budget.limits["params"]
    assert "up to 0.0000" in lines[1]
    assert after.pruner == before.pruner


def test_levels_of_evopress_come_back(
    hand: Callable[..., Path], take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path
) -> None:
    folder = hand("unstructured", "evopress")
    plan, _ = take(folder / "out" / "levels.txt", "unstructured")
    meta = torch.load(folder / "out" / "metadata.pth", weights_only=True)
    lines = dict(line.split(": ") for line in (folder / "out" / "levels.txt").read_text().splitlines())
    for unit in plan.space.units:
        columns = 48 if "down_proj" in unit.name else 32
        asked = meta["sparsity"] + int(lines[unit.name]) * meta["weights_diff"] / unit.total
        assert kept(plan)[unit.name] == unit.total // columns * round(columns * (1 - asked))
    alone = tmp_path / "alone.txt"
    alone.write_text((folder / "out" / "levels.txt").read_text())
    with pytest.raises(UserError, match=r"metadata.pth: is missing.*--level-zero and --level-step"):
        take(alone, "unstructured")
    again, _ = take(alone, "unstructured", level_zero=meta["sparsity"], level_step=meta["weights_diff"])
    assert kept(again) == kept(plan)


def test_levels_of_tyr_come_back_exactly(
    hand: Callable[..., Path], take: Callable[..., tuple[Plan, list[str]]]
) -> None:
    folder = hand("structured", "tyr")
    assert kept(take(folder / "out" / "levels.txt")[0]) == kept(Plan.load(folder / "plan.json"))


def test_levels_of_darwinlm_come_back(hand: Callable[..., Path], take: Callable[..., tuple[Plan, list[str]]]) -> None:
    folder = hand("structured", "darwinlm")  # shares are in quarters, and it has a level for each of four heads
    assert kept(take(folder / "out" / "levels.txt")[0]) == kept(Plan.load(folder / "plan.json"))


def test_a_list_by_block_is_executed_as_counted(
    take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path, tiny_model: Path, text_folder: Path
) -> None:
    shares = [0.0, 0.26, 0.5]
    (tmp_path / "owl.txt").write_text("0.0, 0.26\n0.5\n")
    (tmp_path / "owl.json").write_text(json.dumps(shares))
    np.save(tmp_path / "owl.npy", np.array(shares))
    plans = [take(tmp_path / f"owl.{suffix}")[0] for suffix in ("txt", "json", "npy")]
    assert plans[0] == plans[1] == plans[2]
    plan, lines = take(tmp_path / "owl.npy", "structured", "ladder.align=4")
    assert [*kept(plan).values()] == [2, 48, 1, 36, 1, 24]
    assert "up to 0.2400 of it (model.layers.1.self_attn)" in lines[1]
    plan.save(tmp_path / "plan.json")
    counted = api.prune(tmp_path / "plan.json", tmp_path / "made", model=tiny_model, text=text_folder)
    made = count_params(tmp_path / "made", plan.space, read_checkpoint(tiny_model))
    assert counted == made == plan.budget.limits["params"]
    assert f"{counted:,} parameters" in lines[0]


def test_n_of_m_takes_the_patterns_that_are_asked_for(
    take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "owl.json").write_text("[0.25, 0.5, 0.0]")
    plan, _ = take(tmp_path / "owl.json", "n:m")
    unit = plan.space.units[0]
    assert [count * 4 // unit.total for count in unit.kept] == [4, 3, 2, 1]
    assert {(u.block, level) for u, level in zip(plan.space.units, plan.allocation, strict=True)} == {
        (0, 1),
        (1, 2),
        (2, 0),
    }


def test_an_imported_plan_is_compared_with_a_searched_one(
    take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path, tiny_model: Path, text_folder: Path
) -> None:
    common: dict[str, Any] = {"text": text_folder, "workers": 0, "runs_dir": tmp_path / "runs", "target": 0.4}
    evolution = ["search.evolution.generations=2", "search.evolution.offspring=3", "search.evolution.survivors=[1]"]
    settings = [*SETTINGS[:3], "tokens.test=256"]
    small = [*settings, *evolution, "search.evolution.tokens=[64]"]
    searched = api.search(tiny_model, name="searched", method="evolution", settings=small, **common).folder
    (tmp_path / "owl.txt").write_text("0.25 0.5 0.5")
    plan, _ = take(tmp_path / "owl.txt")
    plan.save(tmp_path / "owl.json")
    data = api.compare(
        tiny_model,
        name="both",
        plans=[searched / "plan.json", tmp_path / "owl.json"],
        settings=[*settings, "search.tokens=[64]"],
        **common,
    )
    assert {"plan searched", "plan owl"} <= data.measured.keys()
    assert data.measured["plan owl"]["params"] == plan.budget.limits["params"]
    assert data.measured["plan owl"]["kl"] > 0


BAD = [
    ("no.json", None, "No such file or directory"),
    ("a.json", "[0.5, 0.5]", "2 shares for 3 blocks"),
    ("a.json", "[0.5, 0.5, 1.5]", "to remove is 1.5"),
    ("a.json", "[0.5, 0.5, NaN]", "to remove is nan"),
    ("a.json", '{"model.layers.0.mlp.down": 0.5}', "did you mean 'model.layers.0.mlp.down_proj'"),
    ("a.json", '{"lm_head": 0.5}', "no prunable matrix 'lm_head'"),
    ("a.json", '{"model.layers.0.mlp.down_proj": 0.5, "model.layers.0.mlp.down_proj": 0.6}', "is there twice"),
    ("a.json", '{"model.layers.0.mlp.down_proj": 0.5}', "says nothing of model.layers.0.self_attn, .* and 2 more"),
    ("a.json", '{"schema": 3, "kind": "allocator.plan"}', "could not convert string to float"),
    ("a.json", "{", "not an allocation"),
    ("a.csv", "layer,sparsity\nx,0.5\n", "there is no column 'module'"),
    ("a.txt", "half and half", "could not convert string to float: 'half'"),
    ("a.txt", "model.layers.0.mlp.down_proj: 1\n\n", "not an allocation: the line '' has no level"),
    ("a.txt", "model.layers.0.mlp.down_proj: many", "invalid literal for int"),
    ("a.npy", "not an array", "not an allocation"),
    ("a.npy", "", "not an allocation"),
    ("a.txt", "", "0 shares for 3 blocks"),
    ("a.json", "0.5", "not an allocation: neither a list nor an object: '0.5'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_cannot_be_understood_is_refused(
    name: str, content: str | None, message: str, take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        take(tmp_path / name)
    assert "\n" not in str(refusal.value)
    assert name in str(refusal.value)


def test_matrices_that_disagree_are_named(take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path) -> None:
    ratios = dict.fromkeys(OUTPUTS, 0.5) | {"model.layers.1.self_attn.q_proj": 0.0}
    (tmp_path / "a.json").write_text(json.dumps(ratios))
    with pytest.raises(
        UserError, match=r"model.layers.1.self_attn lose kv_groups together.*0 \(q_proj\), 0.5 \(o_proj"
    ):
        take(tmp_path / "a.json")
    ratios = dict.fromkeys(OUTPUTS, 0.5) | {"model.layers.1.self_attn.k_proj": 0.5}
    (tmp_path / "a.json").write_text(json.dumps(ratios))
    with pytest.raises(UserError, match=r"lose query_heads together.*0.5 \(k_proj\)"):
        take(tmp_path / "a.json", "structured", "ladder.attention=query_heads")


def test_settings_of_a_search_are_refused(take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[0.5, 0.5, 0.5]")
    with pytest.raises(UserError, match=r"ladder.sparsities: is for the ladders of a search"):
        take(tmp_path / "a.json", "structured", "ladder.sparsities=[0.5]")
    with pytest.raises(UserError, match=r"pruner.inputs=path: is for the ladders of a search"):
        take(tmp_path / "a.json", "structured", "pruner.inputs=path")
    with pytest.raises(UserError, match="Give both, or neither"):
        take(tmp_path / "a.json", level_zero=0.5)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"weights": 3}, "not the metadata of EvoPress"),
        ([1], "not the metadata of EvoPress"),
        ({"cols_removed_attn": [0, 8], "cols_removed_mlp": [0, 12]}, "level 2 of 0 to 1"),
        ({"mha_sparsity": [0.5], "ffn_sparsity": [0.5], "weights_diff_mha": 8, "weights_diff_mlp": 8}, "IndexError"),
        ({"weights_diff": 8}, "KeyError: 'sparsity'"),
    ],
    ids=str,
)
def test_metadata_that_says_nothing_is_refused(
    metadata: Any, message: str, take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path
) -> None:
    (tmp_path / "levels.txt").write_text("".join(f"{module}: 2\n" for module in OUTPUTS))
    torch.save(metadata, tmp_path / "metadata.pth")
    with pytest.raises(UserError, match=message):
        take(tmp_path / "levels.txt")


def test_metadata_runs_no_code(take: Callable[..., tuple[Plan, list[str]]], tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "levels.txt").write_text(f"{OUTPUTS[0]}: 0\n")
    torch.save({"weights_diff": Harm()}, tmp_path / "metadata.pth")
    with pytest.raises(UserError, match=r"metadata.pth: cannot be read"):
        take(tmp_path / "levels.txt")
    assert not (tmp_path / "harm").exists()
