import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.modeling_pruned import remove
from allocator.model.live.stream import StreamedWalker
from allocator.model.live.walk import BlockWalker
from allocator.pruning.levels.assemble import Assembler, LevelSwitch

MODELS = {
    "llama, tied": ("llama", {"num_hidden_layers": 3}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, in bfloat16": ("llama", {"dtype": "bfloat16"}),
    "llama, in float16": ("llama", {"dtype": "float16"}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2, tied, sharded": ("qwen2", {"shards": True}),
    "qwen3, tied": ("qwen3", {}),
    "qwen3, untied, sharded, in bfloat16": (
        "qwen3",
        {"tie_word_embeddings": False, "shards": True, "dtype": "bfloat16"},
    ),
}


def _tokens(sequences, length):
    return torch.randint(0, 128, (sequences, length), generator=torch.Generator().manual_seed(0))


def _resolved(folder):
    checkpoint = read_checkpoint(folder)
    return checkpoint, resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)


def _on_disk(block):
    return [name for name, parameter in block.named_parameters() if parameter.is_meta]


@pytest.fixture
def streamed(tiny_model):
    return StreamedWalker(*_resolved(tiny_model))


@pytest.fixture
def edited(tiny_model, tmp_path):
    """Changes the tensors of a copy of the tiny model, resolved before."""

    def edit(change):
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return read_checkpoint(folder), _resolved(tiny_model)[1]

    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_hidden_states_and_logits_are_those_of_a_loaded_model(make_model, name, dtype):
    kind, settings = MODELS[name]
    checkpoint, layout = _resolved(make_model(kind, **settings))
    loaded, streamed = BlockWalker(load_model(checkpoint, dtype), layout), StreamedWalker(checkpoint, layout, dtype)
    assert streamed.dtype == loaded.dtype == dtype
    for shape in ((2, 16), (1, 33)):
        expected, found = (
            loaded.embed(Examples.from_ids(_tokens(*shape))),
            streamed.embed(Examples.from_ids(_tokens(*shape))),
        )
        assert torch.equal(found, expected)
        for index in range(len(layout.blocks)):
            expected = loaded.run(index, expected)
            with streamed.loaded(index):
                found = streamed.run(index, found)
            assert found.dtype == dtype
            assert torch.equal(found, expected)
        assert torch.equal(streamed.logits(found), loaded.logits(expected))


def test_only_the_block_that_is_held_is_in_memory(streamed):
    outside = dict(streamed.model.named_parameters())
    for block in streamed.blocks:
        assert _on_disk(block) == [name for name, _ in block.named_parameters()]
    for name, parameter in outside.items():
        assert parameter.is_meta == name.startswith("model.layers.")
    for held in range(3):
        with streamed.loaded(held):
            assert [bool(_on_disk(block)) for block in streamed.blocks] == [index != held for index in range(3)]
            assert not _on_disk(streamed.blocks[held])
        assert all(_on_disk(block) == [name for name, _ in block.named_parameters()] for block in streamed.blocks)


def test_a_block_is_dropped_after_an_error(streamed):
    with pytest.raises(RuntimeError, match="stop"), streamed.loaded(1):
        raise RuntimeError("stop")
    assert _on_disk(streamed.blocks[1]) == [name for name, _ in streamed.blocks[1].named_parameters()]


@torch.inference_mode()
def test_a_block_may_be_held_again(streamed):
    hidden = streamed.embed(Examples.from_ids(_tokens(1, 16)))
    found = []
    for _ in range(2):
        with streamed.loaded(1):
            found.append(streamed.run(1, hidden))
    assert torch.equal(*found)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_what_was_removed_inside_is_dropped_too(streamed, part):
    name = {"attention": "model.layers.1.self_attn", "mlp": "model.layers.1.mlp"}[part]
    original = streamed.model.get_submodule(name)
    with streamed.loaded(1):
        remove(streamed.model, name, part)
        assert not _on_disk(original)
    for module in (original, streamed.blocks[1]):
        assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_what_was_switched_inside_is_dropped_too(tiny_model, pattern):
    checkpoint, layout = _resolved(tiny_model)
    walker, space = StreamedWalker(checkpoint, layout), build_space(layout, checkpoint, pattern, 0.5, bias=True)

    def compact(name):
        unit = next(unit for unit in space.units if unit.name == name)
        if unit.kind == "matrix":
            return {"removed_at": torch.zeros(checkpoint.shapes[f"{name}.weight"], dtype=torch.uint8)}
        sub_block = next(sub_block for sub_block in layout.sub_blocks if sub_block.name == name)
        output = torch.zeros(32, unit.kept[1] * sub_block.width)
        return {"order": torch.arange(unit.total), "output.1": output, "bias.1": torch.zeros(32)}

    with walker.loaded(2):
        switchboard = LevelSwitch(
            walker.model, layout, Assembler(checkpoint, layout, space, compact, _loaded_part(walker))
        )
        for unit in space.units:
            if unit.block == 2:
                switchboard.set(unit.name, 1)
        assert not _on_disk(walker.blocks[2])
    assert all(parameter.is_meta for parameter in walker.blocks[2].parameters())


def _loaded_part(walker):
    """The model; only its units in memory are ever asked for."""
    return SimpleNamespace(get_submodule=walker.model.get_submodule)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_outside_the_blocks_is_named(edited, name):
    checkpoint, layout = edited(lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=rf"model: .*: tensor {name} is missing\. Copy the model again"):
        StreamedWalker(checkpoint, layout)


def test_a_missing_tensor_of_a_block_is_named_when_it_is_held(edited):
    name = "model.layers.1.input_layernorm.weight"
    walker = StreamedWalker(*edited(lambda tensors: tensors.pop(name)))
    with walker.loaded(0):
        pass
    with pytest.raises(UserError, match=rf"tensor {name} is missing\. Copy the model again"), walker.loaded(1):
        pass


@pytest.mark.parametrize("name", ["model.scale", "extra.weight"])
def test_a_tensor_outside_the_blocks_that_is_no_parameter_is_named(edited, name):
    checkpoint, layout = edited(lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(UserError, match=f"LlamaForCausalLM has no parameter {name}"):
        StreamedWalker(checkpoint, layout)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.scale", "model.layers.1.extra.weight"])
def test_a_tensor_of_a_block_that_is_no_parameter_is_named(edited, name):
    walker = StreamedWalker(*edited(lambda tensors: tensors.update({name: torch.ones(4)})))
    with pytest.raises(UserError, match=f"LlamaForCausalLM has no parameter {name}"), walker.loaded(1):
        pass


@torch.inference_mode()
def test_frequencies_that_old_checkpoints_hold_are_left_to_the_model(edited, streamed):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    old = StreamedWalker(*edited(lambda tensors: tensors.update({name: torch.ones(4)})))
    hidden = [walker.embed(Examples.from_ids(_tokens(1, 16))) for walker in (old, streamed)]
    with old.loaded(1), streamed.loaded(1):
        assert torch.equal(old.run(1, hidden[0]), streamed.run(1, hidden[1]))


def test_an_architecture_that_transformers_lacks_is_named(tiny_model):
    checkpoint, layout = _resolved(tiny_model)
    checkpoint.config["architectures"][0] = "NoSuchForCausalLM"
    with pytest.raises(UserError, match=r"transformers .* has no NoSuchForCausalLM"):
        StreamedWalker(checkpoint, layout)
