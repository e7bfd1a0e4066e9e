from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import allocator as api
from allocator.core.errors import UserError
from allocator.interop.contract import check_target
from allocator.interop.targets.llm_compressor import LlmCompressor
from allocator.model.family.schema import find_families_folder


@pytest.fixture(scope="module")
def twelve(make_model: Callable[..., Path]) -> Path:
    """A model of more than ten blocks, with a head of its own."""
    return make_model("llama", num_hidden_layers=12, tie_word_embeddings=False)


def export(executed: Any, folder: Path) -> list[dict[str, Any]]:
    """Export a plan, and return the modifiers of its recipe, each with its name."""
    api.export(executed.folder, "llm-compressor", folder, model=executed.model)
    return read(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert all(stage.endswith("_stage") for stage in recipe)
    groups = [group for stage in recipe.values() for group in stage.items()]
    assert all(name.endswith("_modifiers") for name, _ in groups), "others are skipped without a word"
    return [{"name": name, **settings} for _, group in groups for name, settings in group.items()]


def test_sparsities_are_in_the_order_of_the_real_model(
    execute: Callable[..., Any], twelve: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    family = yaml.safe_load((find_families_folder() / "llama.yaml").read_text())
    family["units"]["mlp"]["inputs"].reverse()
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(family))
    executed = execute(twelve, "unstructured", [f"family={tmp_path / 'family.yaml'}"])
    LlmCompressor().write(executed.source, tmp_path)
    (modifier,) = read(tmp_path)
    targets = modifier["targets"]
    names = [name for name, _ in AutoModelForCausalLM.from_pretrained(twelve).named_modules()]
    assert targets == [name for name in names if name in set(targets)]
    assert targets != sorted(targets)
    planned = {m.module: m.sparsity for m in executed.source.matrices if m.sparsity}
    assert targets != [*planned], "the family names modules in another order than the model has them"
    assert dict(zip(targets, modifier["sparsity"], strict=True)) == pytest.approx(planned)


def test_settings_that_llm_compressor_would_misread(
    execute: Callable[..., Any], tiny_model: Path, n_m: Any, tmp_path: Path
) -> None:
    executed = execute(tiny_model, "unstructured", ["ladder.sparsities=[0.5, 1.0]"])
    some, whole = export(executed, tmp_path / "one")
    assert (some["name"], whole["name"]) == ("SparseGPTModifier", "WandaPruningModifier"), "SparseGPT fails at 1.0"
    assert (set(some["sparsity"]), set(whole["sparsity"])) == ({0.5}, {1.0})
    two, three = sorted(export(n_m, tmp_path / "two"), key=lambda modifier: modifier["mask_structure"])
    assert (two["mask_structure"], three["mask_structure"]) == ("2:4", "3:4"), "as many go, not stay"
    assert (some["mask_structure"], whole["mask_structure"]) == ("0:0", "0:0")
    for plan, modifiers in ((executed, (some, whole)), (n_m, (two, three))):
        targets = [target for modifier in modifiers for target in modifier["targets"]]
        assert sorted(targets) == sorted(m.module for m in plan.source.matrices if m.sparsity), (
            "dense ones are left out"
        )
        assert all(modifier["ignore"] == ["re:.*lm_head"] for modifier in modifiers)
        assert all(type(modifier["sparsity"]) is list for modifier in modifiers)


def test_groups_are_never_cut_by_what_sparsegpt_solves_at_once(
    execute: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_model("llama", hidden_size=48, head_dim=12)
    (modifier,) = export(execute(model, "n:m", ['ladder.patterns=["3:6"]']), tmp_path / "out")
    assert modifier["block_size"] == 126


def test_what_cannot_be_run_is_refused(execute: Callable[..., Any], tiny_model: Path, unstructured: Any) -> None:
    magnitude = execute(tiny_model, "unstructured", ["pruner.name=magnitude"])
    with pytest.raises(UserError, match=r"for magnitude. Use --to torchao"):
        check_target(LlmCompressor(), magnitude.source)
    source = unstructured.source
    with pytest.raises(UserError, match="removes nothing"):
        check_target(LlmCompressor(), replace(source, plan=replace(source.plan, allocation=source.plan.space.dense)))


PLANS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "sparsegpt": ({"num_hidden_layers": 12}, "unstructured", ["ladder.sparsities=[0.15, 0.3, 0.6, 0.8, 1.0]"]),
    "wanda": ({"num_hidden_layers": 12, "dtype": "bfloat16"}, "unstructured", ["pruner.name=wanda"]),
    "2:4 and 1:4": ({"num_hidden_layers": 12}, "n:m", []),
    "wide": (
        {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "dtype": "bfloat16"},
        "unstructured",
        [],
    ),
    "3:6": ({"hidden_size": 144, "intermediate_size": 144, "head_dim": 36}, "n:m", ['ladder.patterns=["3:6"]']),
}


@pytest.mark.consumers
@pytest.mark.parametrize("name", PLANS)
def test_what_llm_compressor_makes_is_as_planned(
    name: str,
    consumer: Callable[..., str],
    execute: Callable[..., Any],
    make_model: Callable[..., Path],
    text_folder: Path,
    tmp_path: Path,
) -> None:
    shape, pattern, settings = PLANS[name]
    executed = execute(make_model("llama", tie_word_embeddings=False, **shape), pattern, settings)
    folder, out = tmp_path / "export", tmp_path / "out"
    modifiers = export(executed, folder)
    run = ["run.py", executed.model, text_folder, out, "--samples", 16, "--length", 64]
    consumer("llm-compressor", folder, "python", *run)
    made = json.loads(consumer("llm-compressor", folder, "python", "verify.py", out, "--json"))["modules"]
    most = max(abs(row["achieved"] - row["planned"]) for row in made.values())
    print(f"{name}: {len(made)} matrices, {len(modifiers)} modifiers, sparsities off by at most {most:.6f}")
    assert most == 0 or name in ("sparsegpt", "wide")
    dense, pruned = (load_file(path / "model.safetensors") for path in (executed.model, out))
    targets = {target for modifier in modifiers for target in modifier["targets"]}
    assert dense.keys() == pruned.keys()
    for key, tensor in dense.items():
        assert torch.equal(tensor, pruned[key]) == (key.removesuffix(".weight") not in targets), key


@pytest.mark.consumers
def test_the_runner_stops_at_a_recipe_in_another_order(
    consumer: Callable[..., str], execute: Callable[..., Any], twelve: Path, text_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    export(execute(twelve, "unstructured"), folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    modifier = recipe["pruning_stage"]["pruning_0_modifiers"]["SparseGPTModifier"]
    pairs = sorted(zip(modifier["targets"], modifier["sparsity"], strict=True))
    modifier["targets"], modifier["sparsity"] = map(list, zip(*pairs, strict=True))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(AssertionError, match="not in the order of"):
        consumer("llm-compressor", folder, "python", "run.py", twelve, text_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
