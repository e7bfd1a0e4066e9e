"""Checkpoints of stock classes, padded with zeros to the widest layer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import allocator as api
from allocator.core.errors import UserError

# attention, mlp, attention, mlp, ...: of two KV groups 0 is both, 2 none; of 48 channels level n keeps 48 - 6 n
UNEVEN = (1, 3, 1, 6)
GONE = (2, 3, 1, 8)
CASES: dict[str, tuple[str, dict[str, Any], list[str], tuple[int, ...]]] = {
    "llama": ("llama", {"num_hidden_layers": 3}, [], (*UNEVEN, 2, 8)),
    "llama, bfloat16, sharded": ("llama", {"dtype": "bfloat16", "shards": True}, [], GONE),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}, [], GONE),
    "llama, every bias gained": ("llama", {}, ["pruner.bias=true"], UNEVEN),
    "llama, bias gained by the MLP": ("llama", {}, ["pruner.bias=true"], (2, 3, 0, 8)),
    "llama, one KV head each": ("llama", {"num_key_value_heads": 4}, [], (2, 3, 3, 6)),
    "llama, heads that do not divide its width": ("llama", {"num_key_value_heads": 4}, [], (1, 3, 3, 6)),
    "llama, query heads": ("llama", {"num_attention_heads": 8}, ["ladder.attention=query_heads"], (3, 2, 2, 5)),
    "llama, wide heads": ("llama", {"head_dim": 12}, [], UNEVEN),
    "llama, no attention": ("llama", {}, [], (2, 1, 2, 4)),
    "mistral, untied": ("mistral", {"tie_word_embeddings": False}, [], GONE),
    "qwen2": ("qwen2", {}, [], GONE),
    "qwen2, query heads": ("qwen2", {"num_attention_heads": 8}, ["ladder.attention=query_heads"], (1, 2, 2, 8)),
    "qwen3": ("qwen3", {}, [], GONE),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}, [], UNEVEN),
    "qwen3, three heads": ("qwen3", {"num_key_value_heads": 4}, [], (1, 3, 3, 6)),
    "olmo2": ("olmo2", {}, [], (1, 3, 0, 6)),
    "nothing saved": ("llama", {}, [], (0, 3, 2, 0)),
    "gemma": ("gemma", {}, [], UNEVEN),
    "gemma2": ("gemma2", {"sliding_window": 8}, [], GONE),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8}, [], GONE),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}, [], UNEVEN),
    "starcoder2": ("starcoder2", {}, [], GONE),
    "starcoder2, query heads": ("starcoder2", {}, ["ladder.attention=query_heads"], (1, 2, 2, 5)),
    "phi3": ("phi3", {"tie_word_embeddings": False}, [], UNEVEN),
    "phi3, gone": ("phi3", {"tie_word_embeddings": False}, [], GONE),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}, [], (2, 3, 3, 6)),
    "gpt_neox, gone": ("gpt_neox", {"tie_word_embeddings": False}, [], (4, 8, 1, 3)),
}
LATER = (
    "llama, every bias gained",
    "llama, heads that do not divide its width",
    "llama, wide heads",
    "llama, no attention",
    "mistral, untied",
    "qwen2, query heads",
    "qwen3, untied",
    "gemma",
    "gemma3_text",
    "starcoder2, query heads",
    "phi3, gone",
    "gpt_neox, gone",
)
"""Cases of the slow suite: what is special to each is in another one too, or in another class."""
SIZES = {
    "llama": {"intermediate_size": 30, "num_key_value_heads": 1, "num_attention_heads": 2},
    "llama, heads that do not divide its width": {"num_attention_heads": 4},
    "llama, query heads": {"intermediate_size": 36, "num_key_value_heads": 2, "num_attention_heads": 4},
    "llama, no attention": {"intermediate_size": 42, "num_key_value_heads": 1, "num_attention_heads": 2},
    "qwen3, three heads": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "olmo2": {"intermediate_size": 30, "num_key_value_heads": 2, "num_attention_heads": 4},
    "nothing saved": {"intermediate_size": 48, "num_key_value_heads": 2, "num_attention_heads": 4},
    "phi3": {"intermediate_size": 30, "num_key_value_heads": 1, "num_attention_heads": 2},
    "starcoder2": {"intermediate_size": 30, "num_key_value_heads": 1, "num_attention_heads": 2},
    "gpt_neox": {"intermediate_size": 30, "num_attention_heads": 4},
}
"""What configurations say, computed by hand."""


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in LATER else ()) for name in names]


def without_head_dim(model: Path, out: Path) -> Path:
    """Copy a model, with the width of a head left to be divided out where the class does so."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    divided = config["model_type"] not in ("qwen3", "gemma", "gemma2", "gemma3_text") and "head_dim" in config
    if divided and config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    if config["model_type"] == "gpt_neox":  # real ones have no such key
        del config["num_key_value_heads"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest,
    execute: Callable[..., Any],
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Any, Path, list[str]]]:
    """Executed plans, their exports, and what was said, by case; of the cases that are tested now."""
    folder, made = tmp_path_factory.mktemp("padded"), {}
    items = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    names = {item.callspec.params.get("name") for item in items}
    tested = {name: case for name, case in CASES.items() if name in names}
    for number, (name, (kind, overrides, assignments, levels)) in enumerate(tested.items()):
        model = without_head_dim(make_model(kind, **overrides), folder / f"model{number}")
        each = execute(model, "structured", assignments, levels=levels)
        made[name] = (
            each,
            folder / str(number),
            api.export(each.folder, "hf-padded", folder / str(number), model=model),
        )
    return made


@pytest.fixture(scope="module")
def logits(exported: Any, reload: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """What the compact and the padded checkpoint gave in float64, by case."""
    found = reload([folder for each, out, _ in exported.values() for folder in (each.checkpoint, out)], dtype="float64")
    return dict(zip(exported, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", cases(CASES))
def test_the_stock_model_gives_the_logits_of_the_compact_one(logits: dict[str, Any], name: str) -> None:
    """Up to rounding of norms, which are computed in float32 in any case."""
    compact, padded = logits[name]
    assert np.abs(compact["logits"]).max() > 0.1
    assert not str(padded["name"]).startswith("Pruned")
    np.testing.assert_allclose(padded["logits"], compact["logits"], atol=1e-6, rtol=0)
    for cached in ("cached", "uncached"):
        np.testing.assert_array_equal(padded[cached], compact[cached])


@pytest.mark.parametrize("name", cases(CASES))
def test_every_value_is_kept_and_the_rest_is_zero(exported: dict[str, Any], name: str) -> None:
    each, out, _ = exported[name]
    compact, padded = tensors(each.checkpoint), tensors(out)
    assert compact.keys() <= padded.keys()
    for key, tensor in padded.items():
        values = compact.get(key, tensor.new_zeros(0))
        assert tensor.dtype == next(iter(compact.values())).dtype
        assert torch.equal(tensor[tensor != 0].sort()[0], values[values != 0].sort()[0]), key


@pytest.mark.parametrize("name", cases(CASES))
def test_it_says_what_is_saved(exported: dict[str, Any], logits: dict[str, Any], name: str) -> None:
    each, out, (saving, how) = exported[name]
    space, stored = each.plan.space, sum(tensor.numel() for tensor in tensors(out).values())
    assert stored == int(logits[name][1]["params"])
    dense, planned = space.cost(space.dense), space.cost(each.plan.allocation)
    said = re.match(r"([\d,]+) parameters stored, of ([\d,]+) dense and ([\d,]+) planned: (.*)", saving)
    assert [int(number.replace(",", "")) for number in said.groups()[:3]] == [stored, dense, planned]
    saved = f"{1 - stored / dense:.1%} saved" if stored < dense else "padding saves nothing"
    assert said[4].startswith(saved)
    assert (name == "nothing saved") is (stored == dense)
    assert "verify.py" in how


@pytest.mark.parametrize("name", ["llama", "llama, query heads"])
def test_it_can_be_verified(exported: dict[str, Any], verify: Callable[..., Any], name: str) -> None:
    each, out, _ = exported[name]
    for folder, code in ((out, 0), (each.model, 1)):
        assert verify(out, folder)[0] == code


@pytest.mark.parametrize("name", cases(SIZES))
def test_it_is_padded_no_further_than_the_class_wants(exported: dict[str, Any], name: str) -> None:
    each, out, _ = exported[name]
    dense, config = (json.loads((folder / "config.json").read_text()) for folder in (each.model, out))
    assert SIZES[name].items() <= config.items()
    assert config.get("head_dim") == (None if name == "gpt_neox" else 8)
    assert ("head_dim" in dense) is (name in ("llama, query heads", "qwen3, three heads"))


@pytest.mark.parametrize("name", cases(CASES))
def test_no_code_is_beside_it(exported: dict[str, Any], name: str) -> None:
    each, out, _ = exported[name]
    assert not list(out.glob("modeling*"))
    dense, config = (json.loads((folder / "config.json").read_text()) for folder in (each.model, out))
    assert config["architectures"] == dense["architectures"]
    assert not {"auto_map", "pruned", "per_layer_config"} & config.keys()
    shards = {path.name for path in out.glob("*.safetensors*")}
    assert shards == {path.name for path in each.model.glob("*.safetensors*")}
    assert {path.name for path in each.model.glob("tokenizer*")} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["gpt2", "falcon"])
def test_a_configuration_with_other_keys_is_refused(
    execute: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    each = execute(make_model(kind), "structured", levels=(0, 1, 0, 2))
    with pytest.raises(
        UserError,
        match=r"knows only the configuration keys of Llama-like models, .* has no intermediate_size\. Use --to hf$",
    ):
        api.export(each.folder, "hf-padded", tmp_path / "out", model=each.model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "qwen3"])
def test_a_class_without_a_place_for_gained_biases_is_refused(
    execute: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    each = execute(make_model(kind), "structured", ["pruner.bias=true"], levels=UNEVEN)
    with pytest.raises(UserError, match=r"ForCausalLM has no model\.layers\.0\.mlp\.down_proj\.bias.*Use --to hf"):
        api.export(each.folder, "hf-padded", tmp_path / "out", model=each.model)
    assert not list(tmp_path.iterdir())
