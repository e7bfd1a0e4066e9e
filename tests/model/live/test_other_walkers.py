"""Walking models that do not generate: one state for all towers, and what follows the blocks asked of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.data.read import read_examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.live.load import load_model
from allocator.model.live.stream import StreamedWalker
from allocator.model.live.walk import BlockWalker

ARCHITECTURES = ("BertModel", "RobertaForMaskedLM", "ViTForImageClassification", "ModernBertModel", "CLIPModel")


@pytest.fixture(scope="module")
def walked(make_other: Callable[..., Path], pixels: Path) -> Callable[[str], Any]:
    """Returns the files, a walker and three examples of a tiny model."""

    def make(architecture: str) -> Any:
        classes = {"num_labels": 5} if "Classification" in architecture else {}
        checkpoint = read_checkpoint(make_other(architecture, **classes))
        layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
        if checkpoint.kind.reads == "text":
            examples = Examples.from_ids(torch.from_numpy(np.random.default_rng(0).integers(3, 128, (3, 20))))
        else:
            examples = read_examples(pixels, checkpoint, {"test": 96}, 32)["test"].to_tensors()
        return checkpoint, layout, BlockWalker(load_model(checkpoint), layout), examples

    return make


def said(walker: BlockWalker, outputs: Any) -> torch.Tensor:
    if walker.kind.logits:
        return outputs.logits
    if walker.kind.reads == "pairs":
        return torch.stack([outputs.text_embeds, outputs.image_embeds], 1)
    return outputs.last_hidden_state


def read(walker: BlockWalker, state: torch.Tensor, examples: Examples) -> torch.Tensor:
    """Return what a walker says, in the shape in which the model does."""
    if not walker.kind.logits:
        return walker.final_states(state, examples)
    logits, head = walker.logit_inputs(state, examples)
    return head(logits)[:, 0] if walker.kind.answers == "classes" else head(logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_by_block_is_the_whole_model(walked, architecture):
    checkpoint, layout, walker, examples = walked(architecture)
    with torch.no_grad():
        expected = said(walker, walker.model(**examples.inputs))
    walker.check(examples)
    assert torch.equal(read(walker, walker.run_all(walker.embed(examples)), examples), expected)

    streamed = StreamedWalker(checkpoint, layout)
    state = streamed.embed(examples)
    for index in range(len(streamed.blocks)):
        with streamed.loaded(index):
            state = streamed.run(index, state)
    assert torch.equal(read(streamed, state, examples), expected)


def test_towers_share_one_state_of_which_a_block_replaces_its_own_part(walked):
    _, layout, walker, examples = walked("CLIPModel")
    assert layout.towers == (2, 2)
    assert [name.partition(".")[0] for name in layout.blocks] == ["text_model"] * 2 + ["vision_model"] * 2
    state = walker.embed(examples)
    text, image = walker.parts(state)
    assert (text.shape, image.shape) == ((3, 12, 32), (3, 5, 24))
    assert state.shape == (3, 12 * 32 + 5 * 24)
    after = walker.run(2, state)
    assert torch.equal(walker.residual(0, after), text)
    assert not torch.equal(walker.residual(2, after), image)
    for first, second in ((0, 2), (2, 0)):  # blocks of different towers know nothing of each other
        swapped = walker.run(second, walker.run(first, state))
        assert torch.equal(swapped, walker.run(first, walker.run(second, state)))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "ModernBertModel"])
def test_gradients_go_back_through_every_tower(walked, architecture):
    """Against differences in float64; ModernBERT turns queries and keys in float32, too coarsely for that."""
    _, _, walker, examples = walked(architecture)
    walker.model.double()
    doubled = examples
    if isinstance(examples, Examples):
        arrays = {n: a.double() if a.is_floating_point() else a for n, a in examples.arrays.items()}
        doubled = Examples(arrays, examples.length)
    state = walker.embed(doubled)
    leaf = state.clone().requires_grad_()
    value = read(walker, walker.run_all(leaf), doubled).square().sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    step = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def moved(size: float) -> float:
        return float(read(walker, walker.run_all(state + size * step), doubled).square().sum())

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert float((gradient * step).sum()) == pytest.approx(slope, rel=1e-4)
    for part in walker.parts(gradient):
        assert part.abs().sum() > 0


def test_old_names_in_files_are_the_models_own(walked, make_other):
    checkpoint, *_ = walked("ViTForImageClassification")
    name = "vit.layers.0.attention.q_proj.weight"
    assert checkpoint.stored[name] == "vit.encoder.layer.0.attention.attention.query.weight"
    assert {*checkpoint.shapes} == {name for name, _ in load_model(checkpoint).named_parameters()}


@pytest.mark.parametrize(
    ("architecture", "first"),
    [("BertModel", "encoder.layer.0"), ("BertForMaskedLM", "bert.encoder.layer.0"), ("LlamaModel", "layers.0")],
)
def test_one_family_file_serves_models_with_and_without_a_head(make_other, architecture, first):
    checkpoint = read_checkpoint(
        make_other(architecture, **({"num_key_value_heads": 2} if "Llama" in architecture else {}))
    )
    layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
    assert layout.blocks[0] == first
    assert layout.tail == ()
    walker = BlockWalker(load_model(checkpoint), layout)
    walker.check(Examples.from_ids(torch.arange(20)[None]))
