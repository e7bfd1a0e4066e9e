"""The checkpoint as it is, with the sizes of its layers in the configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

import allocator as api
from allocator.core.errors import UserError
from allocator.interop.targets.hf import HuggingFace
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.live.load import load_model
from allocator.model.live.modeling_pruned import pruned_class

CASES = ("structured", "query_heads", "qwen3", "mistral", "unstructured", "n_m")
"""Names of fixtures; those of structured plans first."""
STRUCTURED = CASES[:4]


@pytest.fixture(scope="module")
def qwen3(execute: Callable[..., Any], make_model: Callable[..., Path]) -> Any:
    """Heads of KV groups, norms of queries and keys, shards; whole blocks are gone."""
    model = make_model("qwen3", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4, shards=True)
    return execute(model, "structured", levels=(1, 8, 4, 2, 3, 1, 4, 8))


@pytest.fixture(scope="module")
def mistral(execute: Callable[..., Any], make_model: Callable[..., Path]) -> Any:
    """Gained biases, an untied head."""
    model = make_model("mistral", tie_word_embeddings=False)
    return execute(model, "structured", ["pruner.bias=true"], levels=(1, 3, 0, 8))


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Executed plans and their exports, by case."""
    made = {}
    for name in CASES:
        each, out = request.getfixturevalue(name), tmp_path_factory.mktemp(name) / "out"
        api.export(each.folder / "plan.json", "hf", out, model=each.model)
        made[name] = (each, out)
    return made


@pytest.fixture(scope="module", params=["absent", pytest.param("there", marks=pytest.mark.slow)])
def reloaded(request: pytest.FixtureRequest, exported: Any, reload: Callable[..., Any]) -> dict[str, Any]:
    """What the plain checkpoint and the export gave, by case, in a process with and without this package."""
    names = exported if request.param == "absent" else STRUCTURED
    folders = [folder for name in names for folder in (exported[name][0].checkpoint, exported[name][1])]
    found = reload(folders, package=request.param)
    return {name: (found[2 * i], found[2 * i + 1]) for i, name in enumerate(names)}


def test_logits_and_text_are_those_of_the_plain_checkpoint(reloaded: dict[str, Any]) -> None:
    for name, (plain, own) in reloaded.items():
        assert np.abs(plain["logits"]).max() > 0.1
        for what in ("logits", "cached", "uncached", "params", "name"):
            np.testing.assert_array_equal(own[what], plain[what], err_msg=f"{name} {what}")
        np.testing.assert_array_equal(own["cached"], own["uncached"], err_msg=name)
        assert (str(own["name"]) == "PrunedForCausalLM") is (name in STRUCTURED)


@pytest.mark.parametrize("name", STRUCTURED)
def test_transformers_reads_every_layer_as_it_is_stored(exported: dict[str, Any], name: str) -> None:
    each, out = exported[name]
    config = AutoConfig.from_pretrained(out)
    assert config.is_heterogeneous
    shapes = read_checkpoint(out).shapes
    seen = set()
    for index in range(config.num_hidden_layers):
        layer, prefix = config.per_layer_config[index], f"model.layers.{index}"
        rows = {
            key: shapes.get(f"{prefix}.{module}.weight", (0,))[0]
            for key, module in [("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("up", "mlp.up_proj")]
        }
        gone = [part for part, key in (("attention", "q"), ("mlp", "up")) if rows[key] == 0]
        assert layer.skip == gone
        if "attention" not in gone:
            assert layer.num_attention_heads * layer.head_dim == rows["q"]
            assert layer.num_key_value_heads * layer.head_dim == rows["k"]
        if "mlp" not in gone:
            assert layer.intermediate_size == rows["up"]
        seen |= {*gone}
    assert seen == {
        unit.part
        for unit, level in zip(each.plan.space.units, each.plan.allocation, strict=True)
        if not unit.kept[level]
    }
    assert len(config.per_layer_config) == config.num_hidden_layers
    stated = json.loads((out / "config.json").read_text())["per_layer_config"]
    touched = {u.block for u, level in zip(each.plan.space.units, each.plan.allocation, strict=True) if level}
    assert {*map(int, stated)} == touched


@pytest.mark.parametrize("name", CASES)
def test_everything_else_is_the_checkpoint(exported: dict[str, Any], name: str) -> None:
    each, out = exported[name]
    before = {path.name: path.read_bytes() for path in each.checkpoint.iterdir()}
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() - before.keys() == {"planned.json", "verify.py"}
    changed = {key for key in before if before[key] != after[key]}
    assert changed == ({"config.json"} if name in STRUCTURED else set())
    config = json.loads(after["config.json"])
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()
    tokenizer = {key for key in after if key.startswith("tokenizer")}
    assert tokenizer == {path.name for path in each.model.glob("tokenizer*")} != set()


@pytest.mark.parametrize("name", STRUCTURED)
def test_it_is_a_model_for_this_package_too(exported: dict[str, Any], name: str) -> None:
    each, out = exported[name]
    tokens = torch.arange(1, 25)[None]
    with torch.inference_mode():
        plain, own = (load_model(read_checkpoint(f))(tokens).logits for f in (each.checkpoint, out))
    assert torch.equal(plain, own)


def test_a_stock_class_sees_layers_that_are_alike(exported: dict[str, Any]) -> None:
    """One that builds from per_layer_config itself would be fitted twice."""
    seen = []

    class Stock(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            seen.append(config.is_heterogeneous)
            super().__init__(config)

    config = AutoConfig.from_pretrained(exported["structured"][1])
    model = pruned_class(Stock)(config)
    assert (seen, model.config.is_heterogeneous) == ([False], True)


def test_it_can_be_saved_and_loaded_again(exported: dict[str, Any], tmp_path: Path) -> None:
    _, out = exported["structured"]
    model = load_model(read_checkpoint(out))
    model.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text())["per_layer_config"] for folder in (out, tmp_path))
    assert {int(key): layer for key, layer in after.items()} == {int(key): layer for key, layer in before.items()}


def test_heads_have_their_width_where_the_configuration_left_it_open(
    execute: Callable[..., Any], tiny_qwen2: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2, model)
    config = json.loads((model / "config.json").read_text())
    assert config.pop("head_dim") * config["num_attention_heads"] == config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    each = execute(model, "structured", first=1)
    api.export(each.folder, "hf", tmp_path / "out", model=model)
    layers = AutoConfig.from_pretrained(tmp_path / "out").per_layer_config
    assert {layer.head_dim for layer in layers} == {8}
    assert {layer.num_attention_heads for layer in layers} == {2, 4}


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_checkpoint_must_be_there(structured: Any, unstructured: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    shutil.copy(structured.folder / "plan.json", plan)
    for target in ("hf", "hf-padded"):
        with pytest.raises(UserError, match=r"there is no checkpoint next to the plan\. Make it .*prune PLAN"):
            api.export(plan, target, tmp_path / "out", model=structured.model)
        with pytest.raises(UserError, match=r"there is no checkpoint at .*nowhere\. Make it .*--checkpoint FOLDER"):
            api.export(plan, target, tmp_path / "out", model=structured.model, checkpoint=tmp_path / "nowhere")
    api.export(plan, "hf", tmp_path / "out", model=structured.model, checkpoint=structured.checkpoint)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "out"}


@pytest.mark.parametrize("name", ["query_heads", "dense", "unstructured"])
def test_a_checkpoint_must_be_of_the_plan(
    structured: Any, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    other = structured.model if name == "dense" else request.getfixturevalue(name).checkpoint
    for target in ("hf", "hf-padded"):
        with pytest.raises(
            UserError, match=r"is no checkpoint of this plan: model\.layers\..*is planned\. Make it with"
        ):
            api.export(structured.folder, target, tmp_path / "out", model=structured.model, checkpoint=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["unstructured", "n_m"])
def test_masks_must_be_as_sparse_as_planned(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    each = request.getfixturevalue(name)
    with pytest.raises(UserError, match=r"weights that are not zero, and \d+ are planned"):
        api.export(each.folder, "hf", tmp_path / "out", model=each.model, checkpoint=each.model)
    almost = tmp_path / "almost"
    shutil.copytree(each.checkpoint, almost)
    tensors = load_file(almost / "model.safetensors")
    last = [m for m in each.source.matrices if m.zeros][-1]
    weight = tensors[f"{last.module}.weight"]
    weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 1.0
    save_file(tensors, almost / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{last.module}.weight has {last.kept + 1} weights that are not zero"):
        api.export(each.folder, "hf", tmp_path / "out", model=each.model, checkpoint=almost)


def test_biases_are_part_of_the_plan(execute: Callable[..., Any], structured: Any, tmp_path: Path) -> None:
    other = execute(structured.model, "structured", ["pruner.bias=true"], levels=structured.plan.allocation)
    with pytest.raises(UserError, match=r"it holds [\d,]+ parameters, and [\d,]+ are planned"):
        api.export(structured.folder, "hf", tmp_path / "out", model=structured.model, checkpoint=other.checkpoint)


def test_a_gone_sub_block_must_be_gone(structured: Any, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(structured.checkpoint, odd)
    gone = next(m for m in structured.source.matrices if not m.kept)
    tensors = load_file(odd / "model.safetensors") | {f"{gone.module}.weight": torch.ones(gone.shape)}
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{gone.module}\.weight is \[.*\], and absent is planned"):
        HuggingFace().check(replace(structured.source, executed=odd))


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_other_families_go_without_per_layer_config(
    execute: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    each = execute(make_model(kind), "structured")
    api.export(each.folder, "hf", tmp_path / "out", model=each.model)
    config, plain = ((folder / "config.json").read_bytes() for folder in (tmp_path / "out", each.checkpoint))
    assert config == plain
    if kind == "phi3":  # whose keys are Llama's, and matrices are not
        api.export(each.folder, "hf-padded", tmp_path / "padded", model=each.model)
        return
    with pytest.raises(UserError, match=r"hf-padded knows only the configuration keys of Llama-like models"):
        api.export(each.folder, "hf-padded", tmp_path / "padded", model=each.model)


# --- another tool -----------------------------------------------------------------------------------------------

CHOICES = [
    {"text": "def block_unit(layer, level=3):", "options": [" return", " never", " river"], "answer": 0},
    {"text": "# Often paper river", "options": [" green", " small"], "answer": 1},
    {"text": "import tensor", "options": [" while", " budget", " plan", " ladder"], "answer": 3},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}
"""Local tasks of lm-evaluation-harness, of each kind of request that there is."""


def scores(consumer: Callable[..., str], folder: Path, checkpoint: Path) -> dict[str, list[Any]]:
    """Return what lm-evaluation-harness got from a checkpoint, by task and document."""
    folder.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in CHOICES))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"own_{name}", **data, "test_split": "test", **task}))
    consumer(
        "lm-eval",
        folder,
        "lm-eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={checkpoint},trust_remote_code=True,dtype=float32",
        "--tasks",
        *(f"own_{name}" for name in TASKS),
        "--include_path",
        folder,
        "--output_path",
        folder / "out",
        "--log_samples",
        "--device",
        "cpu",
    )
    found = {}
    for name in TASKS:
        (path,) = (folder / "out").rglob(f"samples_own_{name}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[name] = [sample["resps"] for sample in samples]
    return found


@pytest.mark.consumers
def test_lm_evaluation_harness_runs_on_it(
    exported: dict[str, Any],
    consumer: Callable[..., str],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it says of every document is what the model in this process gives, and the same for the plain checkpoint."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    each, out = exported["structured"]
    found = scores(consumer, tmp_path / "own", out)
    assert found == scores(consumer, tmp_path / "plain", each.checkpoint)
    model = load_model(read_checkpoint(out))

    def likelihood(before: list[int], after: list[int]) -> float:
        with torch.inference_mode():
            logs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return float(sum(logs[len(before) - 1 + i, token] for i, token in enumerate(after)))

    for document, choices, whole in zip(CHOICES, found["choice"], found["text"], strict=True):
        text = tokenizer(document["text"])["input_ids"]
        expected = [likelihood(text, tokenizer(option)["input_ids"]) for option in document["options"]]
        np.testing.assert_allclose([float(each[0][0]) for each in choices], expected, atol=1e-3)
        assert float(whole[0][0]) == pytest.approx(likelihood([tokenizer.eos_token_id], text), abs=1e-3)
    assert [len(sample) for sample in found["writing"]] == [1] * len(CHOICES)
    assert any(sample[0][0] for sample in found["writing"])
