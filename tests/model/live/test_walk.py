import copy

import pytest
import torch

from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.live.load import load_model
from allocator.model.live.modeling_pruned import remove
from allocator.model.live.walk import BlockWalker


@pytest.fixture(params=["tiny_model", "tiny_qwen2", "tiny_qwen3"])
def walker(request):
    checkpoint = read_checkpoint(request.getfixturevalue(request.param))
    return BlockWalker(load_model(checkpoint), resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint))


def _tokens(sequences, length, seed=0):
    return torch.randint(0, 128, (sequences, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_block_by_block_is_the_stock_forward(walker):
    for shape in ((2, 16), (1, 33)):
        tokens = _tokens(*shape)
        stock = walker.model(tokens, use_cache=False).logits
        walked = walker.logits(walker.run_all(walker.embed(Examples.from_ids(tokens))))
        assert torch.equal(walked, stock)


@torch.inference_mode()
def test_hidden_states_between_blocks_are_the_stock_ones(walker):
    tokens = _tokens(2, 16)
    hidden = walker.embed(Examples.from_ids(tokens))
    stock = walker.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    for index in range(len(walker.blocks)):
        assert torch.equal(hidden, stock[index])
        hidden = walker.run(index, hidden)


@torch.inference_mode()
def test_shapes_may_be_mixed(walker):
    tokens = [_tokens(3, 16), _tokens(1, 16), _tokens(2, 24)]
    embedded = [walker.embed(Examples.from_ids(batch)) for batch in tokens]
    for batch, hidden in zip(tokens, embedded, strict=True):
        assert torch.equal(walker.logits(walker.run_all(hidden)), walker.model(batch, use_cache=False).logits)


@torch.inference_mode()
def test_embedding_leaves_the_model_whole(walker):
    tokens = _tokens(1, 16)
    before = walker.model(tokens, use_cache=False).logits
    walker.embed(Examples.from_ids(tokens))
    assert torch.equal(walker.model(tokens, use_cache=False).logits, before)
    assert all("forward" not in vars(block) for block in walker.blocks)
    assert not any(block._forward_pre_hooks for block in walker.blocks)


# --- listening to a block --------------------------------------------------------------------------------------

PROJECTIONS = [
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def _calls(model):
    """The modules of the second block that run from now on, in order."""
    called = []
    for name, module in model.named_modules():
        if name.startswith("model.layers.1."):
            module.register_forward_pre_hook(lambda owner, args, name=name: called.append(name))
    return called


@torch.inference_mode()
def test_what_is_heard_is_that_of_a_stock_forward_with_hooks(walker):
    tokens = _tokens(2, 16)
    inputs, outputs = {}, {}
    handles = [
        walker.model.get_submodule(name).register_forward_hook(
            lambda owner, args, output, name=name: (
                (inputs.update({name: args[0]}), outputs.update({name: output})) and None
            )
        )
        for name in PROJECTIONS
    ]
    walker.model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = walker.run(0, walker.embed(Examples.from_ids(tokens)))
    for modules in (PROJECTIONS, PROJECTIONS[::-1], PROJECTIONS[4:5], PROJECTIONS[:2] * 2):
        for entering, expected in ((True, inputs), (False, outputs)):
            found = walker.capture_outputs(1, hidden, modules, entering=entering)
            assert found.keys() == set(modules)
            assert all(torch.equal(found[name], expected[name]) for name in modules)
    assert not any(module._forward_hooks for module in walker.model.modules())


@pytest.mark.parametrize("entering", [True, False])
def test_the_pass_stops_after_the_last_module_of_interest(walker, entering):
    """And before it runs, where what enters it is all that is asked for."""
    hidden = walker.run(0, walker.embed(Examples.from_ids(_tokens(1, 16))))
    run = []
    for module in walker.blocks[1].modules():
        module.register_forward_hook(lambda owner, args, output: run.append(owner))
    walker.capture_outputs(
        1, hidden, ["model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.q_proj"], entering=entering
    )
    attention = walker.blocks[1].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    assert [module for module in run if module in projections] == projections[: 2 if entering else 3]
    assert walker.blocks[1].mlp not in run


def test_modules_that_were_removed_are_left_out(walker):
    hidden = walker.run(0, walker.embed(Examples.from_ids(_tokens(1, 16))))
    remove(walker.model, "model.layers.1.self_attn", "attention")
    called = _calls(walker.model)
    for entering in (True, False):
        found = walker.capture_outputs(1, hidden, [*PROJECTIONS[:5], "model.layers.1.gone"], entering=entering)
        assert found.keys() == {"model.layers.1.mlp.gate_proj"}
    assert not any("up_proj" in name for name in called)
    remove(walker.model, "model.layers.1.mlp", "mlp")
    assert walker.capture_outputs(1, hidden, PROJECTIONS) == {}
    assert torch.equal(walker.run(1, hidden, instead={PROJECTIONS[3]: hidden}), hidden)


@torch.inference_mode()
def test_a_module_whose_answer_is_given_is_not_run(walker):
    hidden = walker.run(0, walker.embed(Examples.from_ids(_tokens(2, 16))))
    attention, mlp = PROJECTIONS[3], PROJECTIONS[6]
    given = {name: torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) for name in (attention, mlp)}
    torch.testing.assert_close(walker.run(1, hidden, instead=given), hidden + given[attention] + given[mlp])
    normed = walker.blocks[1].post_attention_layernorm(hidden + given[attention])
    called = _calls(walker.model)
    answers = {"model.layers.1.self_attn": (given[attention], None), mlp: given[mlp]}
    assert torch.equal(walker.run(1, hidden, instead=answers), hidden + given[attention] + given[mlp])
    assert "model.layers.1.self_attn" in called
    assert "model.layers.1.mlp.up_proj" in called
    assert not any("self_attn." in name for name in called)
    inputs = walker.capture_outputs(
        1, hidden, [attention, "model.layers.1.mlp.up_proj"], instead=answers, entering=True
    )
    assert inputs.keys() == {"model.layers.1.mlp.up_proj"}
    assert torch.equal(inputs["model.layers.1.mlp.up_proj"], normed)
    assert not any("forward" in vars(module) for module in walker.model.modules())
    assert not any(module._forward_hooks for module in walker.model.modules())


@torch.inference_mode()
def test_a_stand_in_runs_in_the_place_of_a_block(walker):
    hidden = walker.run(0, walker.embed(Examples.from_ids(_tokens(2, 16))))
    whole, expected = copy.deepcopy(walker.blocks[1]), walker.run(1, hidden)
    heard = walker.capture_outputs(1, hidden, PROJECTIONS)
    for parameter in walker.blocks[1].parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    assert torch.equal(walker.run(1, hidden, whole), expected)
    found = walker.capture_outputs(1, hidden, PROJECTIONS, whole)
    assert all(torch.equal(found[name], heard[name]) for name in PROJECTIONS)


# --- gradients -------------------------------------------------------------------------------------------------


def test_gradients_are_followed_where_what_enters_asks_for_them(walker):
    hidden = walker.embed(Examples.from_ids(_tokens(2, 16)))
    module = PROJECTIONS[6]
    plain = [hidden, walker.run(1, hidden), walker.run_all(hidden), walker.logits(hidden), walker.states(hidden)]
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in plain)
    leaf = hidden.clone().requires_grad_()
    with walker.record_io(1, [module]) as (inputs, outputs):
        followed = [leaf, walker.run(1, leaf), walker.run_all(leaf), walker.logits(leaf), walker.states(leaf)]
    assert all(tensor.requires_grad for tensor in (*followed, inputs[module], outputs[module]))
    for before, after in zip(plain, followed, strict=True):
        assert torch.equal(before, after)
    assert all(parameter.grad is None for parameter in walker.model.parameters())


def test_nothing_follows_gradients_of_weights_that_ask_for_them(walker):
    """As those of a model in training do, when it is measured in between."""
    walker.model.requires_grad_(True)
    hidden = walker.embed(Examples.from_ids(_tokens(2, 16)))
    heard = walker.capture_outputs(1, hidden, PROJECTIONS)
    found = [hidden, walker.run(1, hidden), walker.run_all(hidden), walker.logits(hidden), walker.states(hidden)]
    assert not any(tensor.requires_grad for tensor in (*found, *heard.values()))


def test_gradients_block_by_block_are_those_of_the_whole_model(walker):
    tokens = _tokens(2, 16)
    heard = []
    handle = walker.blocks[0].register_forward_pre_hook(lambda module, args: heard.append(args[0].requires_grad_()))
    walker.model(tokens, use_cache=False).logits.square().sum().backward()
    handle.remove()
    states = [walker.embed(Examples.from_ids(tokens))]
    for index in range(len(walker.blocks)):
        states.append(walker.run(index, states[-1]))
    leaf = states.pop().requires_grad_()
    (gradient,) = torch.autograd.grad(walker.logits(leaf).square().sum(), leaf)
    for index in reversed(range(len(walker.blocks))):
        leaf = states.pop().requires_grad_()
        (gradient,) = torch.autograd.grad(walker.run(index, leaf), leaf, gradient)
    torch.testing.assert_close(gradient, heard[0].grad, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
