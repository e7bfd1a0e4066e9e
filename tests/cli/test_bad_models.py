"""Models, family files, exports and imports that cannot be used: one clear message, and nothing changed on disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from allocator.model.family.schema import find_families_folder

Refused = Callable[..., str]
Args = list[object]
Change = Callable[[Any], object]


@pytest.fixture
def model(tiny_model: Path, here: Path) -> Path:
    """A copy of the Llama of three blocks, to be spoilt."""
    return Path(shutil.copytree(tiny_model, here / "model"))


def edit_config(model: Path, change: Change) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(model: Path, change: Change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def refused_by_all(refused: Refused, search_args: Args, model: Path) -> str:
    """What inspecting it and searching on it say, which is the same."""
    message = refused("inspect", model)
    assert "\n" not in message
    assert refused(*search_args, "--model", model) == message
    return message


def family_file(here: Path, change: Change, shipped: str = "llama") -> list[str]:
    """Arguments that name a family file, made of a shipped one."""
    data = yaml.safe_load((find_families_folder() / f"{shipped}.yaml").read_text())
    change(data)
    (here / "family.yaml").write_text(yaml.safe_dump(data))
    return ["--set", f"family={here / 'family.yaml'}"]


# --- weights that are shared ----------------------------------------------------------------------------------

UP = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize(
    "ties",
    [
        dict([UP]),
        {r"model\.layers\.[12]\.mlp\.up_proj\.weight": UP[1]},
        {"model.layers.0.mlp.gate_proj.weight": UP[1]},
    ],
    ids=["of two blocks", "of all blocks", "of one block"],
)
def test_matrices_that_are_one_tensor(
    refused: Refused,
    search_args: Args,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    ties: dict[str, str],
    stored: str,
) -> None:
    stock = transformers.LlamaForCausalLM._tied_weights_keys
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tied_weights_keys", {**stock, **ties})
    if stored == "once":
        tied = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(model))
        tied.save_pretrained(model)
        assert len(load_file(model / "model.safetensors")) < len(tied.state_dict())
    message = refused_by_all(refused, search_args, model)
    assert "are one tensor in LlamaForCausalLM" in message
    assert UP[1] in message
    assert "List both under 'skip'" in message


def test_an_embedding_that_is_the_matrix_of_a_unit(
    refused: Refused, search_args: Args, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ties = {"model.layers.0.mlp.up_proj.weight": "model.embed_tokens.weight"}
    square = make_model("llama", intermediate_size=128)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tied_weights_keys", ties)
    message = refused_by_all(refused, search_args, square)
    assert "model.layers.0.mlp.up_proj.weight" in message
    assert "model.embed_tokens.weight" in message
    assert "are one tensor" in message


@pytest.mark.parametrize("change", ["values", "type"])
def test_tied_head_that_differs(refused: Refused, search_args: Args, model: Path, change: str) -> None:
    """transformers would keep both, and a checkpoint without the head would be another model."""

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.bfloat16() if change == "type" else embedding + 0.001

    edit_weights(model, untie)
    message = refused_by_all(refused, search_args, model)
    assert "lm_head.weight and model.embed_tokens.weight are one matrix by config.json (tie_word_embeddings)" in message
    assert "Set that to false" in message


def test_layers_that_share_their_weights(refused: Refused, search_args: Args, model: Path) -> None:
    edit_config(model, lambda config: config.update(num_hidden_layers=6))
    message = refused_by_all(refused, search_args, model)
    assert "matches 3 blocks of LlamaForCausalLM, and config.json says 6 layers" in message
    assert "layers that share their weights cannot be pruned" in message


# --- biases and other vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_bias_of_another_length(
    refused: Refused, search_args: Args, make_model: Callable[..., Path], here: Path, module: str
) -> None:
    model = shutil.copytree(make_model("llama", attention_bias=True, mlp_bias=True), here / "model")
    name = f"model.layers.1.{module}.bias"
    edit_weights(model, lambda tensors: tensors.update({name: torch.zeros(20)}))
    message = refused_by_all(refused, search_args, model)
    assert f"{name} has the shape [20], and LlamaForCausalLM makes it [" in message
    assert "copy the model again" in message


def test_bias_that_some_blocks_lack(
    refused: Refused, search_args: Args, make_model: Callable[..., Path], here: Path
) -> None:
    model = shutil.copytree(make_model("qwen2"), here / "model")
    edit_weights(model, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    message = refused_by_all(refused, search_args, model)
    assert "model.layers.1.self_attn.k_proj.bias is not in the files, and has a place in Qwen2ForCausalLM" in message
    assert "copy the model again" in message


def test_shard_without_its_biases(
    refused: Refused, search_args: Args, make_model: Callable[..., Path], here: Path
) -> None:
    """Neither the index nor the shard that is left has them."""
    model = shutil.copytree(make_model("qwen2", shards=True), here / "model")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    homes = index["weight_map"]
    name = "model.layers.0.self_attn.q_proj.bias"
    shard = model / homes.pop(name)
    path.write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert f"{name} is not in the files" in refused_by_all(refused, search_args, model)


def test_bias_without_a_place(refused: Refused, search_args: Args, model: Path) -> None:
    """transformers would leave it out without a word."""
    biases = {f"model.layers.{block}.self_attn.q_proj.bias": torch.zeros(32) for block in range(3)}
    edit_weights(model, lambda tensors: tensors.update(biases))
    message = refused_by_all(refused, search_args, model)
    assert "model.layers.0.self_attn.q_proj.bias is in the files, and has no place in LlamaForCausalLM" in message
    assert "Correct the configuration" in message


def add_vectors(model: Path, name: str, length: int) -> None:
    """Put a vector of ones into every block."""
    vectors = {f"model.layers.{block}.{name}": torch.ones(length) for block in range(3)}
    edit_weights(model, lambda tensors: tensors.update(vectors))


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("mlp.norm.weight", 48),  # of hidden channels
        ("mlp.inner.scale.weight", 48),
        ("self_attn.sinks", 4),  # of each query head
        ("self_attn.scale", 2),  # of each KV group
    ],
)
def test_vector_of_what_is_lost(refused: Refused, search_args: Args, model: Path, name: str, length: int) -> None:
    add_vectors(model, name, length)
    message = refused_by_all(refused, search_args, model)
    assert f"model.layers.0.{name} of LlamaForCausalLM has {length} values" in message
    assert "pruning reduces a dimension of this size in model.layers.0." in message
    assert "list its module under 'skip'" in message


@pytest.mark.parametrize(("name", "length"), [("q_norm", 32), ("k_norm", 16)])  # 32 is the hidden size too
def test_norm_that_no_line_names(refused: Refused, search_args: Args, model: Path, name: str, length: int) -> None:
    add_vectors(model, f"self_attn.{name}.weight", length)
    message = refused_by_all(refused, search_args, model)
    assert f"model.layers.0.self_attn.{name}.weight of LlamaForCausalLM is as long as all heads together" in message
    assert "name it in unit 'attention' under 'norms'" in message


def test_norm_over_all_heads(refused: Refused, search_args: Args, make_model: Callable[..., Path], here: Path) -> None:
    """OLMo 2, for whose model type a family file is written that says nothing of its norms."""
    named = family_file(here, lambda family: family.update(model_types=["olmo2"]))
    message = refused("inspect", make_model("olmo2"), *named)
    assert "model.layers.0.self_attn.k_norm.weight of Olmo2ForCausalLM is as long as all heads together" in message
    assert message == refused(*search_args, "--model", make_model("olmo2"), *named)


def test_vectors_that_stay_can_be_skipped(cli: Callable[..., Any], model: Path, here: Path) -> None:
    vectors = {f"model.layers.{block}.mlp.norm.weight": torch.ones(48) for block in range(3)}
    edit_weights(model, lambda tensors: tensors.update(vectors))
    named = family_file(here, lambda family: family["skip"].append("model.layers.{block}.mlp.norm"))
    assert cli("inspect", model, *named).code == 0


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["alone", "beside a model"])
def test_adapter(refused: Refused, search_args: Args, model: Path, beside: str) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 4)}, model / "adapter_model.safetensors")
    if beside == "alone":
        (model / "config.json").unlink()
        (model / "model.safetensors").unlink()
    message = refused_by_all(refused, search_args, model)
    assert f"{model / 'adapter_config.json'}: an adapter (LoRA, PEFT)" in message
    assert "merge_and_unload()" in message
    assert ("move the adapter's files elsewhere" in message) is (beside != "alone")


def test_adapter_without_its_configuration(refused: Refused, search_args: Args, model: Path) -> None:
    """Its file would be read as a shard."""
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 4)}, model / "adapter_model.safetensors")
    assert "adapter_model.safetensors: an adapter" in refused_by_all(refused, search_args, model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "model.lm_head.modules_to_save.default.weight",
    ],
)
def test_weights_with_an_adapter_in_them(refused: Refused, search_args: Args, model: Path, name: str) -> None:
    edit_weights(model, lambda tensors: tensors.update({name: torch.zeros(4, 4)}))
    message = refused_by_all(refused, search_args, model)
    assert f"{name} is part of an adapter" in message
    assert "merge_and_unload()" in message


# --- quantised weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"])
def test_quantised_by_its_configuration(refused: Refused, search_args: Args, model: Path, method: str) -> None:
    edit_config(model, lambda config: config.update(quantization_config={"quant_method": method}))
    message = refused_by_all(refused, search_args, model)
    assert f"{model}: quantised weights: config.json has quantization_config ({method})" in message
    assert "dequantize()" in message


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.int8),
        ("model.layers.1.mlp.up_proj.weight", torch.uint8),
        ("model.layers.1.mlp.up_proj.weight", torch.float8_e4m3fn),
        ("model.layers.1.mlp.up_proj.qweight", torch.int32),
        ("model.layers.1.mlp.up_proj.scales", torch.float16),
        ("model.layers.1.mlp.up_proj.weight_packed", torch.int32),
        ("model.layers.1.mlp.up_proj.weight_scale_inv", torch.float32),
        ("model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.uint8),
    ],
)
def test_quantised_by_its_tensors(
    refused: Refused, search_args: Args, model: Path, name: str, dtype: torch.dtype
) -> None:
    edit_weights(model, lambda tensors: tensors.update({name: torch.zeros(48, 32).to(dtype)}))
    message = refused_by_all(refused, search_args, model)
    assert f"quantised weights: {name} is of type " in message
    assert "16 or 32 bits" in message


# --- heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "found"),
    [
        ("llama", {"num_attention_heads": 5}, "not a multiple of the number of attention heads (5)"),
        ("llama", {"num_attention_heads": 0}, "cannot be built from it"),
        ("llama", {"num_key_value_heads": 3}, "k_proj.weight has the shape [16, 32], and Llama"),
        ("llama", {"num_key_value_heads": 4}, "[16, 32], and LlamaForCausalLM makes it [32, 32]"),
        ("llama", {"head_dim": 16}, "q_proj.weight has the shape [32, 32], and LlamaForCausalLM makes it [64, 32]"),
        ("phi3", {"num_key_value_heads": 1}, "[64, 32], and Phi3ForCausalLM makes it [48, 32]"),
        ("gpt_neox", {"num_attention_heads": 3}, "hidden size is not divisible by the number of attention heads"),
        ("gpt2", {"n_head": 5}, "cannot be built from it"),
        ("falcon", {"num_kv_heads": 4}, "query_key_value.weight has the shape [64, 32]"),
    ],
)  # fmt: skip
def test_heads_that_the_weights_have_not(
    refused: Refused,
    search_args: Args,
    make_model: Callable[..., Path],
    here: Path,
    kind: str,
    change: dict[str, int],
    found: str,
) -> None:
    untied = {"tie_word_embeddings": False} if kind in ("phi3", "gpt_neox") else {}
    model = shutil.copytree(make_model(kind, **untied), here / "model")
    edit_config(model, lambda config: config.update(change))
    assert found in refused_by_all(refused, search_args, model)


PARTS = ("query", "key", "value")
SWAPPED: dict[str, tuple[str, Change, str]] = {
    "separate, keys for queries": (
        "llama",
        lambda attention: attention.update(query="self_attn.k_proj", key="self_attn.q_proj"),
        "self_attn.q_proj has 32 rows for 2 KV groups, and model.layers.0.self_attn.k_proj has 16 for 4 query heads",
    ),
    "separate, queries for values": (
        "llama",
        lambda attention: attention.update(value="self_attn.q_proj", query="self_attn.v_proj"),
        "their heads differ in width",
    ),
    "one part, said to be all by part": (
        "llama",
        lambda attention: attention.update(dict.fromkeys(PARTS, "self_attn.q_proj"), fused="by_part"),
        "self_attn.q_proj has 32 rows, which are not 4 query heads of width 8 and equally many key and value heads",
    ),
    "one part, said to be all by group": (
        "qwen2",
        lambda attention: attention.update(dict.fromkeys(PARTS, "self_attn.k_proj"), fused="by_group"),
        "self_attn.k_proj has 16 rows, which are not 4 query heads of width 8 and equally many key and value heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SWAPPED)
def test_heads_that_do_not_fit_the_family_file(
    refused: Refused, search_args: Args, make_model: Callable[..., Path], here: Path, how: str
) -> None:
    kind, change, found = SWAPPED[how]
    named = family_file(here, lambda family: change(family["units"]["attention"]))
    message = refused(*search_args, "--model", make_model(kind), *named)
    assert found in message
    assert "Correct the counts of heads in config.json, or the names in the family file" in message


@pytest.mark.parametrize("pattern", ["structured", "n:m"])
def test_configuration_without_heads(
    refused: Refused, search_args: Args, model: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Its class has a number of its own for what is not said."""
    edit_config(model, lambda config: config.pop("num_attention_heads"))
    assert "config.json" in refused(*search_args, "--model", model, "--pattern", pattern)


# --- family files ---------------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[Change, str]] = {
    "a module in two units": (
        lambda f: f["units"]["mlp"]["inputs"].append("self_attn.q_proj"),
        "self_attn.q_proj is in unit 'attention' and in unit 'mlp', and a matrix has one place",
    ),
    "an output among inputs": (
        lambda f: f["units"]["mlp"]["inputs"].append("mlp.down_proj"),
        "mlp.down_proj is in unit 'mlp' and in the output of unit 'mlp'",
    ),
    "a module in a unit and skipped": (
        lambda f: f["skip"].append("model.layers.2.mlp.up_proj"),
        "model.layers.2.mlp.up_proj is both in a unit and under 'skip'",
    ),
    "modules of all blocks skipped": (
        lambda f: f["skip"].append("model.layers.{block}.self_attn.o_proj"),
        "model.layers.0.self_attn.o_proj is both in a unit and under 'skip'",
    ),
    "a module in a unit and in the tail": (
        lambda f: f["tail"].insert(0, "model.layers.2.mlp.down_proj"),
        "model.layers.2.mlp.down_proj is both in a unit and under 'tail'",
    ),
    "a unit of nothing": (
        lambda f: f["units"]["mlp"].update(output="mlp.donw_proj"),
        "unit 'mlp' names model.layers.0.mlp.donw_proj, which LlamaForCausalLM lacks",
    ),
    "a skip line of nothing": (
        lambda f: f.update(skip=["model.embed_token", "lm_head"]),
        "matrix model.embed_tokens [128, 32] of LlamaForCausalLM is in no unit. 'skip' names 'model.embed_token', "
        "which the model lacks: correct that line",
    ),
    "blocks of nothing": (
        lambda f: f.update(blocks="model.layer.{block}"),
        "blocks 'model.layer.{block}' matches no module of LlamaForCausalLM, whose numbered modules are "
        "model.layers.{block}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", FAMILIES)
def test_family_file(refused: Refused, search_args: Args, tiny_model: Path, here: Path, how: str) -> None:
    change, found = FAMILIES[how]
    named = family_file(here, change)
    message = refused(*search_args, *named)
    assert message.startswith("family: ")
    assert found in message
    assert "\n" not in message


def test_family_file_with_a_key_that_is_there_twice(refused: Refused, search_args: Args, here: Path) -> None:
    content = (find_families_folder() / "llama.yaml").read_text()
    (here / "family.yaml").write_text(content + "blocks: 'model.layers.{block}'\n")
    message = refused(*search_args, "--set", f"family={here / 'family.yaml'}")
    assert f"{here / 'family.yaml'}: not YAML: the key 'blocks' is there twice" in message


def test_family_file_that_is_no_text(refused: Refused, search_args: Args, here: Path) -> None:
    (here / "family.yaml").write_bytes(b"\xff\xfe\x00")
    assert f"{here / 'family.yaml'}: not YAML: " in refused(*search_args, "--set", f"family={here / 'family.yaml'}")


def test_model_type_that_two_files_serve(
    refused: Refused, search_args: Args, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(find_families_folder(), here / "families")
    shutil.copy(folder / "llama.yaml", folder / "mine.yaml")
    monkeypatch.setattr("allocator.model.family.schema.find_families_folder", lambda: folder)
    message = refused(*search_args)
    assert f"{folder / 'llama.yaml'} and {folder / 'mine.yaml'} both serve the model type 'llama'" in message
    assert "Take it out of one of them" in message


@pytest.mark.parametrize(
    ("gone", "left"), [([1], "up to number 2, but number 1"), ([0, 1], "up to number 2, but number 0")]
)
def test_blocks_with_gaps(refused: Refused, search_args: Args, model: Path, gone: list[int], left: str) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(tuple(f"model.layers.{number}." for number in gone))]:
            del tensors[name]

    edit_weights(model, drop)
    message = refused_by_all(refused, search_args, model)
    assert f"{left} is missing" in message
    assert "Copy the model again" in message


def test_last_block_missing(refused: Refused, search_args: Args, model: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            del tensors[name]

    edit_weights(model, drop)
    assert "matches 2 blocks of LlamaForCausalLM, and config.json says 3" in refused_by_all(refused, search_args, model)


# --- folders of other formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-q4.gguf", "GGUF"),
        ("pytorch_model.bin", "pickled PyTorch"),
        ("pytorch_model-00001-of-00002.bin", "pickled PyTorch"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_other_formats(
    refused: Refused, search_args: Args, model: Path, name: str, kind: str, configured: bool
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"weights")
    if not configured:
        (model / "config.json").unlink()
    message = refused_by_all(refused, search_args, model)
    assert f"{model / name}: weights of another format ({kind}), and there is no *.safetensors file" in message
    assert ("gguf_file" in message) is (kind == "GGUF")
    assert "save_pretrained" in message


def test_model_file_of_gguf(refused: Refused, search_args: Args, here: Path) -> None:
    (here / "model.gguf").write_bytes(b"GGUF")
    assert "Give a local Hugging Face folder" in refused_by_all(refused, search_args, here / "model.gguf")


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", {}])
def test_configuration_without_architectures(refused: Refused, search_args: Args, model: Path, named: Any) -> None:
    edit_config(model, lambda config: config.update(architectures=named))
    message = refused_by_all(refused, search_args, model)
    assert f"{model / 'config.json'} names no class (architectures: {json.dumps(named)})" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("named", [None, "", 3])
def test_configuration_without_model_type(refused: Refused, search_args: Args, model: Path, named: Any) -> None:
    edit_config(model, lambda config: config.update(model_type=named))
    message = refused_by_all(refused, search_args, model)
    assert f"{model / 'config.json'} names no type of model (model_type: {json.dumps(named)})" in message
    assert "Write that of LlamaForCausalLM there" in message


def test_class_that_transformers_lacks(refused: Refused, search_args: Args, model: Path) -> None:
    edit_config(model, lambda config: config.update(architectures=["NoSuchForCausalLM"]))
    message = refused_by_all(refused, search_args, model)
    assert f"transformers {transformers.__version__} has no NoSuchForCausalLM" in message


def test_configuration_of_another_vocabulary(refused: Refused, search_args: Args, model: Path) -> None:
    edit_config(model, lambda config: config.update(vocab_size=999))
    message = refused_by_all(refused, search_args, model)
    assert "model.embed_tokens.weight has the shape [128, 32], and LlamaForCausalLM makes it [999, 32]" in message


# --- exports --------------------------------------------------------------------------------------------------


@pytest.fixture
def export_args(own_run: Path, tiny_model: Path) -> Args:
    return ["export", own_run, "--model", tiny_model]


@pytest.mark.parametrize(
    ("to", "near"), [("hf_padded", "did you mean 'hf-padded'?"), ("ratio", "did you mean 'ratios'?"), ("x", "known: ")]
)
def test_export_to_an_unknown_target(refused: Refused, export_args: Args, here: Path, to: str, near: str) -> None:
    message = refused(*export_args, "--to", to, "--out", here / "out")
    assert f"--to: unknown target {to!r}" in message
    assert near in message


@pytest.mark.parametrize("kind", ["file", "empty folder", "full folder", "link"])
def test_export_to_what_exists(refused: Refused, export_args: Args, here: Path, kind: str) -> None:
    out = here / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(here / "nowhere")
    else:
        out.mkdir()
    if kind == "full folder":
        (out / "thesis.tex").write_text("years of work")
    message = refused(*export_args, "--to", "ratios", "--out", out)
    assert f"{out}: exists already. Name another folder with --out" in message


@pytest.mark.parametrize("deeper", ["out", "deep/out"])
@pytest.mark.parametrize("place", ["model", "run"])
@pytest.mark.parametrize("to", ["ratios", "hf"])
def test_export_into_what_it_reads(
    refused: Refused, own_run: Path, model: Path, to: str, place: str, deeper: str
) -> None:
    inside = {"model": model, "run": own_run}[place]
    message = refused("export", own_run, "--model", model, "--to", to, "--out", inside / deeper)
    assert f"{inside / deeper}: lies inside of the {place} " in message
    assert "Name another folder with --out" in message


def test_prune_into_the_model(refused: Refused, own_run: Path, model: Path) -> None:
    message = refused("prune", own_run / "plan.json", "--model", model, "--out", model / "smaller")
    assert f"{model / 'smaller'}: lies inside of the model {model}" in message


def test_export_where_nothing_can_be_written(refused: Refused, export_args: Args, here: Path) -> None:
    (here / "file").write_text("not a folder")
    message = refused(*export_args, "--to", "ratios", "--out", here / "file" / "out")
    assert f"{here / 'file'}: not a folder that can be written to" in message


def test_export_of_a_plan_of_another_model(refused: Refused, own_run: Path, tiny_qwen2: Path, here: Path) -> None:
    message = refused("export", own_run, "--model", tiny_qwen2, "--to", "ratios", "--out", here / "out")
    assert f"{tiny_qwen2} is another model" in message
    assert "Name the plan's model with --model" in message


@pytest.mark.parametrize("to", ["hf", "hf-padded"])
def test_export_without_a_checkpoint(refused: Refused, export_args: Args, own_run: Path, here: Path, to: str) -> None:
    shutil.rmtree(own_run / "checkpoint")
    message = refused(*export_args, "--to", to, "--out", here / "out")
    assert (
        f"{to} carries weights, and there is no checkpoint next to the plan. Make it with 'allocator prune" in message
    )
    named = refused(*export_args, "--to", to, "--out", here / "out", "--checkpoint", here / "gone")
    assert f"there is no checkpoint at {here / 'gone'}" in named


@pytest.mark.parametrize("to", ["hf", "hf-padded"])
def test_export_of_a_checkpoint_of_another_plan(
    refused: Refused, export_args: Args, tiny_model: Path, here: Path, to: str
) -> None:
    message = refused(*export_args, "--to", to, "--out", here / "out", "--checkpoint", tiny_model)
    assert f"{tiny_model} is no checkpoint of this plan: model.layers.0." in message


@pytest.mark.parametrize("command", ["export", "prune"])
def test_plan_whose_family_file_is_not_at_hand(
    refused: Refused, own_run: Path, tiny_model: Path, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """As where the search had a file of its own for the model type."""
    shutil.copytree(find_families_folder(), here / "families")
    (here / "families" / "llama.yaml").unlink()
    monkeypatch.setattr("allocator.model.family.schema.find_families_folder", lambda: here / "families")
    plan = [own_run, "--to", "ratios"] if command == "export" else [own_run / "plan.json"]
    message = refused(command, *plan, "--model", tiny_model, "--out", here / "out")
    assert "no family file is shipped for the model type 'llama'" in message
    assert "--family FILE" in message
    gone = refused(command, *plan, "--model", tiny_model, "--out", here / "out", "--family", here / "gone.yaml")
    assert f"{here / 'gone.yaml'}: No such file" in gone


@pytest.mark.parametrize("command", ["export", "prune"])
def test_plan_of_another_family_file(
    refused: Refused, own_run: Path, tiny_model: Path, here: Path, command: str
) -> None:
    def attention_alone(family: Any) -> None:
        del family["units"]["mlp"]
        family["skip"] += [f"model.layers.{{block}}.mlp.{part}_proj" for part in ("gate", "up", "down")]

    family_file(here, attention_alone)
    plan = [own_run, "--to", "ratios"] if command == "export" else [own_run / "plan.json"]
    message = refused(command, *plan, "--model", tiny_model, "--out", here / "out", "--family", here / "family.yaml")
    assert "disagree on model.layers.0.mlp. " in message
    assert "Name the family file that it was made with, with --family FILE" in message


# --- imports --------------------------------------------------------------------------------------------------


class Harm:
    """What creates a folder as it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def import_args(tiny_model: Path, text_folder: Path, sets: list[str], here: Path) -> Args:
    return ["--out", here / "plan.json", "--model", tiny_model, "--text", text_folder, *sets]


IMPORTS = [
    ("a.json", '{"model.layers.0.mlp.down": 0.5}', "did you mean 'model.layers.0.mlp.down_proj'?"),
    ("a.json", '{"lm_head": 0.5}', "no prunable matrix 'lm_head'"),
    ("a.csv", "module,sparsity\nmodel.layers.9.mlp.down_proj,0.5\n", "no prunable matrix"),
    ("a.json", "[0.5, 0.5, 1.5]", "to remove is 1.5; shares are in [0, 1]"),
    ("a.json", "[0.5, 0.5, -0.5]", "to remove is -0.5"),
    ("a.txt", "50 50 50", "to remove is 50"),
    ("a.json", "[0.5, 0.5, NaN]", "to remove is nan"),
    ("a.txt", "0.5 nan 0.5", "to remove is nan"),
    ("a.json", "[0.5, 0.5, Infinity]", "to remove is inf"),
    ("a.json", "[0.5, 0.5]", "2 shares for 3 blocks. Give one for each block"),
    ("a.txt", "0.5 0.5 0.5 0.5", "4 shares for 3 blocks"),
    ("a.json", "[]", "0 shares for 3 blocks"),
    ("a.json", "{}", "says nothing of model.layers.0.self_attn"),
    ("a.json", "", "not an allocation"),
    ("a.txt", "", "0 shares for 3 blocks"),
    ("a.csv", "", "says nothing of model.layers.0.self_attn"),
    ("a.csv", "module,share\nx,0.5\n", "there is no column 'sparsity'"),
]


@pytest.mark.parametrize(("name", "content", "found"), IMPORTS)
def test_import_of_a_bad_file(
    refused: Refused, import_args: Args, here: Path, name: str, content: str, found: str
) -> None:
    (here / name).write_text(content)
    message = refused("import", here / name, *import_args)
    assert message.startswith(f"{here / name}: ")
    assert found in message
    assert "\n" not in message


ARRAYS = {
    "of objects": (lambda folder: np.array([0.5, 0.5, Harm(folder)], dtype=object), "not an allocation: Object arrays"),
    "of two dimensions": (lambda folder: np.full((3, 2), 0.5), "not an allocation: an array of the shape [3, 2]"),
    "of one number": (lambda folder: np.array(0.5), "not an allocation: an array of the shape []"),
    "of nothing": (lambda folder: np.array([]), "0 shares for 3 blocks"),
    "of NaN": (lambda folder: np.array([0.5, np.nan, 0.5]), "to remove is nan"),
    "of words": (lambda folder: np.array(["half", "0.5", "0.5"]), "not an allocation: could not convert string"),
    "of complex numbers": (lambda folder: np.array([0.5j, 0.5, 0.5]), "not an allocation: "),
}  # fmt: skip


@pytest.mark.parametrize("how", ARRAYS)
def test_import_of_a_bad_array(refused: Refused, import_args: Args, here: Path, how: str) -> None:
    make, found = ARRAYS[how]
    np.save(here / "a.npy", make(here / "harm"))
    message = refused("import", here / "a.npy", *import_args)
    assert message.startswith(f"{here / 'a.npy'}: ")
    assert found in message
    assert (
        "Give a table or JSON object of shares" in message
        or "Give one for each block" in message
        or "[0, 1]" in message
    )


@pytest.mark.parametrize("suffix", ["npy", "json", "txt", "csv"])
def test_import_of_a_pickle_runs_no_code(refused: Refused, import_args: Args, here: Path, suffix: str) -> None:
    (here / f"a.{suffix}").write_bytes(pickle.dumps(Harm(here / "harm")))
    message = refused("import", here / f"a.{suffix}", *import_args)
    assert f"{here / f'a.{suffix}'}: not an allocation: " in message
    assert "allow_pickle" not in message
    assert not (here / "harm").exists()
