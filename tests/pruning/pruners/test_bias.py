"""Lost means that come back as biases: costs, live models, saved checkpoints."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.live.load import load_model
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner
from allocator.run.config.load import load_config
from allocator.run.model import read_model

MODELS = {
    "llama": ("llama", {}, "kv_groups"),
    "llama, query heads": ("llama", {}, "query_heads"),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}, "kv_groups"),
    "llama, bfloat16": ("llama", {"dtype": "bfloat16"}, "kv_groups"),
    "llama, sharded": ("llama", {"shards": True}, "kv_groups"),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}, "kv_groups"),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, make_model, make_case):
    kind, overrides, attention = MODELS[request.param]
    return make_case(make_model(kind, **overrides), "structured", "obs", attention, bias=True)


def _allocations(space):
    rng = np.random.default_rng(1)
    random = [tuple(int(rng.integers(unit.num_levels)) for unit in space.units) for _ in range(4)]
    return [space.dense, space.sparsest, (1,) * len(space.units), *random]


def _switched(case, model, allocations):
    board = LevelSwitch(
        model, case.layout, Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__, model)
    )
    for allocation in allocations:
        for unit, level in zip(case.space.units, allocation, strict=True):
            board.set(unit.name, level)
    return model


def test_biases_count_between_dense_and_nothing(case, make_case):
    plain = make_case(case.checkpoint.folder, "structured", "obs", case.space.units[0].kind).space
    sub_blocks = {sub_block.name: sub_block for sub_block in case.layout.sub_blocks}
    for own, without in zip(case.space.units, plain.units, strict=True):
        output = sub_blocks[own.name].output
        added = 0 if f"{output}.bias" in case.checkpoint.shapes else 32
        assert own.params == (
            without.params[0],
            *(count + added for count in without.params[1:-1]),
            0,
        )
        assert (own.kept, own.macs) == (without.kept, without.macs)
    assert case.space.fixed == plain.fixed


@torch.inference_mode()
def test_saved_checkpoints_run_without_this_package_and_cost_what_the_space_says(case, tokens, tmp_path):
    probe, space = tokens(2, 2, 16), case.space
    for number, allocation in enumerate(_allocations(space)):
        out = tmp_path / f"{case.checkpoint.folder.name}-{number}"
        counted = save_pruned(allocation, case.checkpoint, case.layout, space, case.compact.__getitem__, out)
        assert set(read_checkpoint(out).dtypes.values()) == set(case.checkpoint.dtypes.values())
        remote = AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code="pruned" in read_checkpoint(out).config, dtype=torch.float32
        ).eval()
        live = _switched(case, case.walker().model, [allocation])
        logits = remote(probe, use_cache=False).logits
        ours = load_model(read_checkpoint(out))
        torch.testing.assert_close(logits, ours(probe, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        # a bias that is the sum of two is rounded once more when saved
        near = 1e-4 if "BF16" not in case.checkpoint.dtypes.values() else 0.05
        torch.testing.assert_close(logits, live(probe, use_cache=False).logits, rtol=near, atol=near)
        for model in (remote, live):
            assert sum(parameter.numel() for parameter in model.parameters()) == counted == space.cost(allocation)
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        cached, uncached = (remote.generate(probe[:, :8], use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, uncached)


@torch.inference_mode()
def test_what_was_switched_before_does_not_matter(case, tokens):
    probe, walker = tokens(2, 2, 16), case.walker()
    dense = walker.model(probe, use_cache=False).logits
    *rest, last = _allocations(case.space)
    switched = _switched(case, walker.model, [*rest, last])
    fresh = _switched(case, case.walker().model, [last])
    assert torch.equal(switched(probe, use_cache=False).logits, fresh(probe, use_cache=False).logits)
    back = _switched(case, case.walker().model, [*rest, last, case.space.dense])
    assert torch.equal(back(probe, use_cache=False).logits, dense)


@torch.inference_mode()
def test_the_mean_output_of_a_sub_block_is_the_dense_one(make_case, make_model):
    """On the calibration text itself, whose means are given back."""
    case = make_case(make_model("llama", mlp_bias=True), "structured", "obs", bias=True)
    sub_block = case.layout.sub_blocks[1]

    def mean_output(level):
        seen = []
        model = _switched(case, case.walker().model, [(0, level, 0, 0)])
        model.get_submodule(sub_block.output).register_forward_hook(lambda m, a, out: seen.append(out))
        for batch in case.tokens.split(4):
            model(batch, use_cache=False)
        return torch.cat([out.flatten(0, 1) for out in seen]).double().mean(0)

    dense = mean_output(0)
    for level in range(1, 8):
        torch.testing.assert_close(mean_output(level), dense, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_channels_that_never_vary_cost_nothing(make_case, make_model, tokens):
    """Gate and up rows that are all bias make twelve channels constants."""
    from safetensors.torch import load_file, save_file

    folder = make_model("llama", mlp_bias=True, seed=4)
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"][:12] = 0.0
        tensors[f"model.layers.0.mlp.{name}.bias"][:12] = 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    case = make_case(folder, "structured", "obs", bias=True)
    unit = case.space.units[1]
    assert set(case.compact[unit.name]["order"][-12:].tolist()) == set(range(12))
    probe, walker = tokens(6, 2, 16), case.walker()
    dense = walker.model(probe, use_cache=False).logits
    found = _switched(case, walker.model, [(0, 2, 0, 0)])(probe, use_cache=False).logits
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


def test_pruning_along_an_allocation(case, tokens, tmp_path):
    allocation = tuple(1 if unit.part == "attention" else 4 for unit in case.space.units)
    calibration = case.calibration()
    compact = dict(prune_on_pruned_inputs(calibration, allocation, every_level=False))
    out = tmp_path / "out"
    assert save_pruned(
        allocation, case.checkpoint, case.layout, case.space, compact.__getitem__, out
    ) == case.space.cost(allocation)
    near = 1e-4 if "BF16" not in case.checkpoint.dtypes.values() else 0.05
    with torch.inference_mode():
        saved = load_model(read_checkpoint(out))(tokens(2, 2, 16)).logits
        torch.testing.assert_close(saved, calibration.walker.model(tokens(2, 2, 16)).logits, rtol=near, atol=near)


def test_only_structured_pruning_fits_biases(tiny_model):
    assert make_pruner(PrunerSpec(name="obs", bias=True), "structured").settings() == {"damping": 0.01, "bias": True}
    with pytest.raises(UserError, match=r"pruner\.bias: wanda fits no bias"):
        make_pruner(PrunerSpec(name="wanda", bias=True), "unstructured")
    flags = {"model": str(tiny_model)}
    plain, with_bias = (
        read_model(load_config(keys=flags, assignments=[f"pruner.bias={bias}"]))[2] for bias in ("false", "true")
    )
    assert with_bias.units[0].params[1] == plain.units[0].params[1] + 32
