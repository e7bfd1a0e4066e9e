"""Query heads that go alone: costs, live models, saved checkpoints."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.execute import save_pruned
from allocator.run.config.load import load_config
from allocator.run.model import read_model

SHAPE = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": ("llama", {}),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, make_model, make_case):
    kind, overrides = MODELS[request.param]
    return make_case(make_model(kind, **SHAPE, **overrides), "structured", "obs", "query_heads")


def _allocations(space):
    rng = np.random.default_rng(0)
    attention = [tuple(level * (unit.part == "attention") for unit in space.units) for level in (1, 2, 3)]
    return [*attention, *(tuple(int(rng.integers(unit.num_levels)) for unit in space.units) for _ in range(4))]


def _live(case, allocation):
    walker = case.walker()
    board = _board(case, walker.model)
    for unit, level in zip(case.space.units, allocation, strict=True):
        board.set(unit.name, level)
    return walker.model


def _board(case, model):
    return LevelSwitch(
        model, case.layout, Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__)
    )


def test_ladders_take_from_every_group_down_to_nothing(case):
    unit = case.space.units[0]
    assert (unit.kind, unit.total, unit.kept, unit.group) == ("query_heads", 6, (6, 4, 2, 0), 3)
    model = case.walker().model
    attention = model.get_submodule(unit.name)
    assert unit.params[0] == sum(parameter.numel() for parameter in attention.parameters())
    per_head = 2 * 8 * 36 + (8 if attention.q_proj.bias is not None else 0)
    assert unit.params[1:] == (unit.params[0] - 2 * per_head, unit.params[0] - 4 * per_head, 0)
    dense_macs = sum(m.weight.numel() for m in attention.modules() if isinstance(m, nn.Linear))
    assert unit.macs == (dense_macs, dense_macs - 4 * 8 * 36, dense_macs - 8 * 8 * 36, 0)


@torch.inference_mode()
def test_saved_checkpoints_run_without_this_package_and_cost_what_the_space_says(case, tokens, tmp_path):
    probe, space = tokens(2, 2, 16), case.space
    for number, allocation in enumerate(_allocations(space)):
        out = tmp_path / f"{case.checkpoint.folder.name}-{number}"
        counted = save_pruned(allocation, case.checkpoint, case.layout, space, case.compact.__getitem__, out)
        remote = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
        assert type(remote).__module__.startswith("transformers_modules.")
        live = _live(case, allocation)
        logits = remote(probe, use_cache=False).logits
        torch.testing.assert_close(logits, live(probe, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        ours = load_model(read_checkpoint(out))
        torch.testing.assert_close(logits, ours(probe, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        for model in (remote, live):
            assert sum(parameter.numel() for parameter in model.parameters()) == counted == space.cost(allocation)
        linears = [module for module in remote.modules() if isinstance(module, nn.Linear)]
        assert sum(module.weight.numel() for module in linears) == space.cost(allocation, "macs")
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        cached, uncached = (remote.generate(probe[:, :8], use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, uncached)


@torch.inference_mode()
def test_a_level_is_the_dense_model_without_those_heads(case, tokens):
    """With the output projection's own columns for a refit, it computes what zeroed columns compute."""
    probe, unit = tokens(3, 2, 16), case.space.units[0]
    model = case.walker().model
    output = model.get_submodule(case.layout.sub_blocks[0].output)
    for level in (1, 2):
        order = case.compact[unit.name]["order"].view(2, 3)
        kept = [int(item) for part in order for item in part[: 3 - level]]
        columns = [item * 8 + k for item in kept for k in range(8)]
        compact = {unit.name: {"order": case.compact[unit.name]["order"], f"output.{level}": output.weight[:, columns]}}
        live = case.walker().model
        assembler = Assembler(case.checkpoint, case.layout, case.space, compact.__getitem__)
        LevelSwitch(live, case.layout, assembler).set(unit.name, level)
        weight = output.weight.clone()
        output.weight[:, sorted({*range(48)} - {*columns})] = 0.0
        masked = model(probe, use_cache=False).logits
        output.weight.copy_(weight)
        torch.testing.assert_close(live(probe, use_cache=False).logits, masked, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_live_model_goes_through_all_levels_and_back(case, tokens):
    probe, space = tokens(2, 2, 16), case.space
    walker = case.walker()
    dense, board = walker.model(probe, use_cache=False).logits, _board(case, walker.model)
    for level in (1, 3, 2, 0, 2, 1, 3, 0):
        for unit in space.units:
            if unit.part == "attention":
                board.set(unit.name, level)
        found = walker.model(probe, use_cache=False).logits
        again = _live(case, [level * (unit.part == "attention") for unit in space.units])
        assert torch.equal(found, again(probe, use_cache=False).logits)
        assert torch.equal(found, dense) == (level == 0)


def test_pruning_along_an_allocation(case, tokens, tmp_path):
    allocation = tuple(2 if unit.part == "attention" else 3 for unit in case.space.units)
    calibration = case.calibration()
    compact = dict(prune_on_pruned_inputs(calibration, allocation, every_level=False))
    save_pruned(allocation, case.checkpoint, case.layout, case.space, compact.__getitem__, tmp_path / "out")
    with torch.inference_mode():
        saved = load_model(read_checkpoint(tmp_path / "out"))(tokens(2, 2, 16)).logits
        torch.testing.assert_close(saved, calibration.walker.model(tokens(2, 2, 16)).logits, rtol=1e-4, atol=1e-4)


def test_sparsities_are_rounded_to_whole_rounds(make_model):
    checkpoint = read_checkpoint(make_model("llama", num_attention_heads=8, num_key_value_heads=2))
    layout = resolve_layout(find_family("llama"), checkpoint, "query_heads")
    units = build_space(layout, checkpoint, "structured", 0.5, ladder=[0.2, 0.5, 0.6, 1.0]).units
    assert units[0].kept == (8, 6, 4, 0)


def test_a_model_with_one_query_head_per_group_is_referred_to_groups(make_model):
    checkpoint = read_checkpoint(make_model("llama", num_key_value_heads=4))
    with pytest.raises(UserError, match=r"one query head per KV group.*--set ladder\.attention=kv_groups"):
        resolve_layout(find_family("llama"), checkpoint, "query_heads")


def test_the_configuration_selects_it(make_model):
    folder = make_model("llama", **SHAPE)
    flags = {"model": str(folder)}
    assert read_model(load_config(keys=flags))[2].units[0].kind == "kv_groups"
    heads = ["ladder.attention=query_heads"]
    assert {unit.kind for unit in read_model(load_config(keys=flags, assignments=heads))[2].units} == {
        "query_heads",
        "channels",
    }
    with pytest.raises(UserError, match=r"ladder\.attention: query_heads serves structured pruning"):
        read_model(load_config(keys={**flags, "pattern": "unstructured"}, assignments=heads))
    with pytest.raises(UserError, match=r"ladder\.attention"):
        load_config(keys=flags, assignments=["ladder.attention=heads"])
