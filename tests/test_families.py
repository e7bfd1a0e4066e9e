"""Every family of models goes the whole way: inspect, search, plan, prune, and reload as stock transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import allocator
from allocator.config import load_config
from allocator.model.family import families_folder, load_family
from allocator.model.headers import read_model_files
from allocator.model.load import load_model

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

PATTERNS = ("structured", "unstructured", "n:m")
CASES = [
    pytest.param(
        kind, pattern, marks=[] if pattern == "structured" or kind in ("llama", "gpt2", "opt") else pytest.mark.slow
    )
    for kind in FAMILIES
    for pattern in PATTERNS
]
"""Masks are made in one way for all families but those whose matrices lie inputs first, or in the block itself."""

SETTINGS = (
    "tokens.sequence_length=64 tokens.calibration=512 tokens.selection=64 tokens.test=128 search.rounds=1 "
    "search.method=evolution search.evolution.generations=2 search.evolution.offspring=4 "
    "search.evolution.tokens=[64] search.evolution.survivors=[1]"
).split()


def families_table() -> str:
    """Return the README's table of families."""
    lines = ["| family | model types | file |", "|---|---|---|"]
    homes = {kind: path for path in sorted(families_folder().glob("*.yaml")) for kind in load_family(path).model_types}
    assert homes.keys() == FAMILIES.keys()
    for path in dict.fromkeys(homes[kind] for kind in FAMILIES):
        kinds = [kind for kind in FAMILIES if homes[kind] == path]
        names = ", ".join(FAMILIES[kind][0] for kind in kinds)
        types = ", ".join(f"`{kind}`" for kind in kinds)
        lines.append(f"| {names} | {types} | [{path.name}](search_spaces/{path.name}) |")
    return "\n".join(lines)


def test_the_readme_lists_what_is_tested() -> None:
    assert families_table() in Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "pattern"), CASES)
def test_a_family_goes_the_whole_way(
    kind: str, pattern: str, make_model: Callable[..., Path], text_folder: Path, tmp_path: Path
) -> None:
    model = make_model(kind, **FAMILIES[kind][1])
    flags = {"model": str(model), "pattern": pattern}
    space, _ = allocator.inspect(load_config(None, flags, []))
    dense = load_model(read_model_files(model))
    kept = [buffer for name, buffer in dense.named_buffers() if name in dense.state_dict()]
    assert space.cost(space.dense) == sum(tensor.numel() for tensor in (*dense.parameters(), *kept))

    result = allocator.search(
        model,
        pattern=pattern,
        target=0.5,
        workers=0,
        name="run",
        runs_dir=tmp_path,
        text=text_folder,
        settings=SETTINGS,
    )
    measured, plan = result.summary["measured"], allocator.Plan.load(result.folder / "plan.json")
    assert measured["searched"]["params"] == plan.space.cost(plan.allocation)
    assert measured["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    again = allocator.evaluate(result.checkpoint, model=model, text=text_folder, tokens=128, length=64)
    assert again["kl"] == pytest.approx(measured["searched"]["kl"], rel=1e-5)

    reloaded = reload(result.checkpoint)
    tokens = torch.arange(40).view(2, 20)
    own = load_model(read_model_files(result.checkpoint))
    torch.testing.assert_close(reloaded(tokens).logits, own(tokens).logits, rtol=0, atol=1e-5)
    written = [
        reloaded.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*written)


def reload(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
