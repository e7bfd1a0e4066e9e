"""Every family of models goes the whole way: inspect, search, plan, prune, and reload as stock transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import allocator
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.read import read_examples
from allocator.model.family.schema import find_families_folder, load_family
from allocator.model.live.load import load_model
from allocator.run.config.load import load_config

FAMILIES = {
    "llama": ("Llama 2 and 3", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen 2 and 2.5", {}),
    "qwen3": ("Qwen 3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma 2", {"sliding_window": 8}),
    "gemma3_text": ("Gemma 3, text", {"sliding_window": 8}),
    "granite": ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "starcoder2": ("StarCoder 2", {}),
    "phi3": ("Phi 3 and 4", {"tie_word_embeddings": False}),
    "gpt2": ("GPT-2", {}),
    "gpt_neox": ("GPT-NeoX, Pythia", {"tie_word_embeddings": False}),
    "falcon": ("Falcon", {}),
    "opt": ("OPT", {}),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", {"sliding_window": 8}),
    "mixtral": ("Mixtral", {"sliding_window": 8}),
    "qwen2_moe": ("Qwen 2 MoE", {}),
    "qwen3_moe": ("Qwen 3 MoE", {}),
    "olmoe": ("OLMoE", {}),
    "glm4_moe": ("GLM 4 MoE", {}),
    "deepseek_v2": ("DeepSeek 2", {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepSeek 3", {"q_lora_rank": 12, "norm_topk_prob": True}),
}
"""Model types by name in words, and what makes a tiny one that has what is special to it."""

OTHERS = {
    "bert": ("BERT, MiniLM", "BertModel"),
    "roberta": ("RoBERTa", "RobertaForMaskedLM"),
    "xlm-roberta": ("XLM-RoBERTa", "XLMRobertaModel"),
    "camembert": ("CamemBERT", "CamembertModel"),
    "electra": ("ELECTRA", "ElectraModel"),
    "distilbert": ("DistilBERT", "DistilBertForMaskedLM"),
    "modernbert": ("ModernBERT", "ModernBertModel"),
    "vit": ("ViT", "ViTModel"),
    "deit": ("DeiT", "DeiTModel"),
    "dinov2": ("DINOv2", "Dinov2Model"),
    "clip": ("CLIP", "CLIPModel"),
    "siglip": ("SigLIP", "SiglipModel"),
    "clip_text_model": ("CLIP's text tower", "CLIPTextModel"),
    "clip_vision_model": ("CLIP's image tower", "CLIPVisionModel"),
    "siglip_text_model": ("SigLIP's text tower", "SiglipTextModel"),
    "siglip_vision_model": ("SigLIP's image tower", "SiglipVisionModel"),
}
"""Models that do not generate, by type: their name in words, and the architecture that stands for them."""

HEADS = ("BertForMaskedLM", "BertForSequenceClassification", "ViTForImageClassification", "ModernBertForMaskedLM")
"""What else is made of these."""

PATTERNS = ("structured", "unstructured", "n:m")
QUICK = [
    ("unstructured", "BertModel"),
    ("unstructured", "ViTModel"),
    ("n:m", "BertModel"),
    *(("structured", name) for name in ("BertModel", "ViTModel", *HEADS)),
    *(("structured", name) for name in ("DistilBertForMaskedLM", "Dinov2Model", "CLIPModel", "SiglipModel")),
]
"""Patterns and architectures of the default suite; the towers of a model are in the model."""
ALIKE = ("mistral", "qwen2", "gemma", "gemma3_text", "olmo3", "qwen2_moe", "deepseek_v2")
"""Types whose names and computations another type of their file has too."""

MASKED = {"unstructured": ("llama", "gpt2", "opt", "mixtral"), "n:m": ("gpt2",)}
"""Masks are made in one way for all but where matrices lie inputs first, or in the block itself, or are stacked."""

CASES = [
    pytest.param(
        kind,
        pattern,
        marks=[] if (kind not in ALIKE if pattern == "structured" else kind in MASKED[pattern]) else pytest.mark.slow,
    )
    for kind in FAMILIES
    for pattern in PATTERNS
]

SETTINGS = (
    "tokens.sequence_length=64 tokens.calibration=512 tokens.selection=64 tokens.test=128 search.rounds=1 "
    "search.method=evolution search.evolution.generations=2 search.evolution.offspring=4 "
    "search.evolution.tokens=[64] search.evolution.survivors=[1]"
).split()


OTHER_CASES = [
    pytest.param(name, pattern, marks=[] if (pattern, name) in QUICK else pytest.mark.slow)
    for name in (*HEADS, *(architecture for _, architecture in OTHERS.values()))
    for pattern in PATTERNS
]


def families_table() -> str:
    """Return the table of families in docs/families.md."""
    lines = ["| family | model types | file |", "|---|---|---|"]
    homes = {
        kind: path for path in sorted(find_families_folder().glob("*.yaml")) for kind in load_family(path).model_types
    }
    words = {kind: name for kind, (name, _) in (*FAMILIES.items(), *OTHERS.items())}
    assert homes.keys() == words.keys()
    for path in dict.fromkeys(homes[kind] for kind in words):
        kinds = [kind for kind in words if homes[kind] == path]
        names = ", ".join(words[kind] for kind in kinds)
        types = ", ".join(f"`{kind}`" for kind in kinds)
        lines.append(f"| {names} | {types} | [{path.name}](../search_spaces/{path.name}) |")
    return "\n".join(lines)


def test_the_page_lists_what_is_tested() -> None:
    page = Path(__file__).parents[1] / "docs" / "families.md"
    assert families_table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "pattern"), CASES)
def test_a_family_goes_the_whole_way(
    kind: str, pattern: str, make_model: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    goes_the_whole_way(make_model(kind, **FAMILIES[kind][1]), pattern, text_folder, tmp_path)


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_files_as_first_published_go_the_whole_way(
    kind: str, pattern: str, make_model: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    """As GPT-2 and Pythia lie on hubs: with masks in the files, without the base's name or what goes without saying."""
    model = make_model(kind, **FAMILIES[kind][1])
    config = json.loads((model / "config.json").read_text())
    base, mask = ("transformer.", "attn") if kind == "gpt2" else ("gpt_neox.", "attention")
    tensors = {
        name.removeprefix(base if kind == "gpt2" else ""): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    for name in [name for name in tensors if name.endswith((f"{mask}.dense.weight", "attn.c_proj.weight"))]:
        block = name.rsplit(".", 2)[0]
        tensors |= {f"{block}.bias": torch.ones(1, 1, 64, 64), f"{block}.masked_bias": torch.tensor(-1e9)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if kind == "gpt2":
        del config["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    goes_the_whole_way(model, pattern, text_folder, tmp_path)


def searched(model: Path, pattern: str, text: Path, runs_dir: Path) -> Any:
    """Return what a search leaves, whose checkpoint holds what its plan says."""
    result = allocator.search(
        model,
        pattern=pattern,
        target=0.5,
        workers=0,
        name="run",
        runs_dir=runs_dir,
        text=text,
        settings=SETTINGS,
    )
    plan = allocator.Plan.load(result.folder / "plan.json")
    assert result.summary["measured"]["searched"]["params"] == plan.space.cost(plan.allocation)
    return result


def goes_the_whole_way(model: Path, pattern: str, text_folder: Path, tmp_path: Path) -> None:
    flags = {"model": str(model), "pattern": pattern}
    space, _ = allocator.inspect(config=load_config(None, flags, []))
    dense = load_model(read_checkpoint(model))
    kept = [buffer for name, buffer in dense.named_buffers() if name in dense.state_dict()]
    assert space.cost(space.dense) == sum(tensor.numel() for tensor in (*dense.parameters(), *kept))

    result = searched(model, pattern, text_folder, tmp_path)
    measured = result.summary["measured"]
    assert measured["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    again = allocator.evaluate(result.checkpoint, model=model, text=text_folder, tokens=128, length=64)
    assert again["kl"] == pytest.approx(measured["searched"]["kl"], rel=1e-5)

    reloaded = reload(result.checkpoint)
    tokens = torch.arange(40).view(2, 20)
    own = load_model(read_checkpoint(result.checkpoint))
    torch.testing.assert_close(reloaded(tokens).logits, own(tokens).logits, rtol=0, atol=1e-5)
    written = [
        reloaded.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize(("architecture", "pattern"), OTHER_CASES)
def test_a_model_that_does_not_generate_goes_the_whole_way(
    architecture: str,
    pattern: str,
    make_other: Callable[..., Path],
    text_folder: Path,
    labelled: Path,
    pixels: Path,
    tmp_path: Path,
) -> None:
    model = make_other(architecture, **({"num_labels": 5} if architecture.endswith("Classification") else {}))
    checkpoint = read_checkpoint(model)
    text = labelled if "Sequence" in architecture else text_folder if checkpoint.kind.reads == "text" else pixels
    flags = {"model": str(model), "pattern": pattern}
    space, _ = allocator.inspect(config=load_config(None, flags, []))
    assert space.cost(space.dense) == sum(p.numel() for p in load_model(checkpoint).parameters())
    assert {"prefill_macs", "weight_bytes"} < {*space.fixed}
    assert not {"kv_bytes", "decode_macs"} & {*space.fixed}

    result = searched(model, pattern, text, tmp_path)
    measured = result.summary["measured"]
    away = "kl" if checkpoint.kind.logits else "hidden"
    assert measured["dense"][away] == pytest.approx(0, abs=1e-6)
    assert "perplexity" not in measured["searched"]
    assert ("accuracy" in measured["searched"]) == architecture.endswith("Classification")
    again = allocator.evaluate(result.checkpoint, model=model, text=text, tokens=128, length=64)
    assert again[away] == pytest.approx(measured["searched"][away], rel=1e-5)

    auto = getattr(transformers, checkpoint.kind.auto)
    reloaded = auto.from_pretrained(result.checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    examples = read_examples(text, checkpoint, {"test": 128}, 64)["test"]
    inputs = examples.to_tensors().inputs
    own, dense = load_model(read_checkpoint(result.checkpoint)), load_model(checkpoint)
    with torch.no_grad():
        found, expected, before = (answer(each(**inputs), checkpoint.kind.answers) for each in (reloaded, own, dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if checkpoint.kind.logits:
        log_p, log_q = (each.double().log_softmax(-1) for each in (before, found))
        distance = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    else:
        distance = float((before - found).double().square().sum() / before.double().square().sum())
    assert measured["searched"][away] == pytest.approx(distance, rel=1e-4)


def answer(outputs: Any, answers: str) -> torch.Tensor:
    """Return what a model says: logits, states, or the embeddings of two towers."""
    if answers != "states":
        return outputs.logits
    if "text_embeds" in outputs:
        return torch.stack([outputs.text_embeds, outputs.image_embeds], 1)
    return outputs.last_hidden_state


def reload(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
