import pytest
import torch

from allocator.model.family import find_family, resolve_layout
from allocator.model.headers import read_model_files
from allocator.model.load import load_model
from allocator.model.walk import BlockWalker


@pytest.fixture(params=["tiny_model", "tiny_qwen2", "tiny_qwen3"])
def walker(request):
    files = read_model_files(request.getfixturevalue(request.param))
    return BlockWalker(load_model(files), resolve_layout(find_family(files.config["model_type"]), files))


def _tokens(sequences, length, seed=0):
    return torch.randint(0, 128, (sequences, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_block_by_block_is_the_stock_forward(walker):
    for shape in ((2, 16), (1, 33)):
        tokens = _tokens(*shape)
        stock = walker.model(tokens, use_cache=False).logits
        walked = walker.logits(walker.run_all(walker.embed(tokens)))
        assert torch.equal(walked, stock)


@torch.inference_mode()
def test_hidden_states_between_blocks_are_the_stock_ones(walker):
    tokens = _tokens(2, 16)
    hidden = walker.embed(tokens)
    stock = walker.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    for index in range(len(walker.blocks)):
        assert torch.equal(hidden, stock[index])
        hidden = walker.run(index, hidden)


@torch.inference_mode()
def test_shapes_may_be_mixed(walker):
    tokens = [_tokens(3, 16), _tokens(1, 16), _tokens(2, 24)]
    embedded = [walker.embed(batch) for batch in tokens]
    for batch, hidden in zip(tokens, embedded, strict=True):
        assert torch.equal(walker.logits(walker.run_all(hidden)), walker.model(batch, use_cache=False).logits)


@torch.inference_mode()
def test_embedding_leaves_the_model_whole(walker):
    tokens = _tokens(1, 16)
    before = walker.model(tokens, use_cache=False).logits
    walker.embed(tokens)
    assert torch.equal(walker.model(tokens, use_cache=False).logits, before)
    assert all("forward" not in vars(block) for block in walker.blocks)
    assert not any(block._forward_pre_hooks for block in walker.blocks)
