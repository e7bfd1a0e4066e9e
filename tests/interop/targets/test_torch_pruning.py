from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import allocator as api
from allocator.core.errors import UserError
from allocator.core.space import Unit
from allocator.interop.contract import check_target
from allocator.interop.targets.torch_pruning import TorchPruning, _ratio
from allocator.model.checkpoint.headers import read_checkpoint

SOME = "ladder.sparsities=[0.25, 0.5, 0.75]"
HEADS = "ladder.attention=query_heads"
EIGHT = {"num_hidden_layers": 3, "num_attention_heads": 8}


def export(executed: Any, folder: Path) -> dict[str, Any]:
    api.export(executed.folder, "torch-pruning", folder, model=executed.model)
    arguments: dict[str, Any] = json.loads((folder / "ratios.json").read_text())
    return arguments


def test_ratios_are_whole_again_the_way_torch_pruning_rounds() -> None:
    for total in range(1, 130):
        unit = Unit(
            name="unit",
            kind="channels",
            part="mlp",
            block=0,
            total=total,
            kept=(*range(total, 0, -1),),
            params=(1,) * total,
            macs=(1,) * total,
        )
        for level in range(1, total):
            ratio = _ratio(unit, level)
            assert total - int(total * (1 - ratio)) == level, "of widths"
            assert math.ceil(ratio * total) == level, "of heads"


def test_every_name_is_in_the_real_model(
    execute: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    executed = execute(make_model("qwen3", **EIGHT), "structured", [HEADS, SOME], first=1)
    arguments = export(executed, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(executed.model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    narrowed = {
        m.module for m in executed.source.matrices if m.sparsity and not m.module.endswith(("o_proj", "down_proj"))
    }
    attention = {name for name in modules if name.endswith(("q_proj", "k_proj", "v_proj"))}
    assert narrowed <= arguments["pruning_ratio_dict"].keys() <= modules.keys()
    assert arguments["head_pruning_ratio_dict"].keys() == arguments["num_heads"].keys() <= attention
    assert all(arguments["pruning_ratio_dict"][name] > 0 for name in arguments["num_heads"]), "heads are kept otherwise"
    assert set(arguments["num_heads"].values()) == {8, 2}
    kept = {*modules, *parameters} & {*arguments["ignored_layers"]}
    assert kept == {*arguments["ignored_layers"]}
    assert {"lm_head", "model.embed_tokens", "model.layers.2.mlp.down_proj", "model.layers.0.self_attn.o_proj"} <= kept
    assert "model.layers.1.self_attn.q_norm.weight" in kept


def test_what_torch_pruning_cannot_do_is_refused(
    execute: Callable[..., Any], tiny_model: Path, structured: Any, query_heads: Any
) -> None:
    for executed in (structured, query_heads):
        with pytest.raises(UserError, match=r"cannot remove the whole of model\.layers\.\d\.self_attn, "):
            check_target(TorchPruning(), executed.source)
    half = ["ladder.sparsities=[0.5]"]
    with pytest.raises(UserError, match=r"no KV head, and the plan takes KV groups of model\.layers\.0\.self_attn"):
        check_target(TorchPruning(), execute(tiny_model, "structured", half, first=1).source)
    channels = execute(tiny_model, "structured", half).source
    check_target(TorchPruning(), channels)
    plan = replace(channels.plan, pruner={**channels.plan.pruner, "bias": True})
    with pytest.raises(UserError, match="adds no bias"):
        check_target(TorchPruning(), replace(channels, plan=plan))


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "gpt_neox", "falcon"])
def test_other_ways_of_heads_are_refused(
    execute: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    executed = execute(make_model(kind), "structured", levels=(0, 1, 0, 2))
    with pytest.raises(UserError, match=r"knows the heads of Llama-like models, and this is a \w+\. Use --to"):
        export(executed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


PLANS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "query heads": ("llama", EIGHT, [HEADS, SOME]),
    "KV heads of one query head": ("llama", {"num_hidden_layers": 3, "num_key_value_heads": 4}, [SOME]),
    "biases": ("qwen2", EIGHT, [HEADS, SOME]),
    "norms of heads": ("qwen3", {**EIGHT, "dtype": "bfloat16"}, [HEADS, SOME]),
}


@pytest.mark.consumers
@pytest.mark.parametrize("name", PLANS)
def test_what_torch_pruning_makes_has_the_widths_of_the_plan(
    name: str,
    consumer: Callable[..., str],
    execute: Callable[..., Any],
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    kind, shape, settings = PLANS[name]
    executed = execute(make_model(kind, **shape), "structured", settings, first=1)
    folder, out = tmp_path / "export", tmp_path / "out"
    export(executed, folder)
    consumer("torch", folder, "python", "apply.py", executed.model, out)
    consumer("torch", folder, "python", "verify.py", out)
    shapes = read_checkpoint(out).shapes
    assert all(shapes[f"{m.module}.weight"] == m.kept_shape for m in executed.source.matrices)
    load = {"trust_remote_code": True, "dtype": torch.float32}
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path, **load) for path in (executed.model, out))
    assert sum(p.numel() for p in pruned.parameters()) == executed.plan.space.cost(executed.plan.allocation)
    tokens = torch.arange(24).reshape(2, 12)
    for sub_block in executed.layout.sub_blocks:
        first = sub_block.inputs[0][0]
        rows, kept = (model.get_submodule(first).weight for model in (dense, pruned))
        gone = ~(rows[:, None] == kept).all(2).any(1)
        assert gone.sum() == len(rows) - len(kept)
        dense.get_submodule(sub_block.output).weight.data[:, gone] = 0
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    more = {"min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    assert pruned.generate(tokens, attention_mask=torch.ones_like(tokens), **more).shape == (2, 16)
