"""Engines of models that do not generate, against whole models in float64 whose weights are put together by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from stores import create_store
from torch.nn import functional

from allocator.core.protocols import FEATURES, Request
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner

CASES = {
    "ViTForImageClassification": ("kl", "nll", "hidden"),
    "BertForMaskedLM": ("kl", "topk_kl", "hidden"),
    "CLIPModel": ("hidden",),
}
PAIRS = [(architecture, loss) for architecture, losses in CASES.items() for loss in losses]
COUNT, LENGTH = 18, 16


def _examples(kind, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    if kind.reads == "text":
        return Examples.from_ids(rng.integers(3, 128, (COUNT, LENGTH)))
    arrays = {"pixel_values": rng.normal(size=(COUNT, 3, 16, 16)).astype(np.float32)}
    if kind.reads == "pairs":
        arrays["input_ids"] = rng.integers(3, 128, (COUNT, 12))
    if kind.answers == "classes":
        arrays["labels"] = rng.integers(0, 5, COUNT)
    return Examples(arrays, LENGTH)


@pytest.fixture(scope="module")
def made(make_other, tmp_path_factory):
    """Makes, once for each architecture, what an engine is made from, and its examples."""
    known = {}

    def make(architecture):
        if architecture not in known:
            classes = {"num_labels": 5} if "Classification" in architecture else {}
            checkpoint = read_checkpoint(make_other(architecture, **classes))
            layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
            space, pruner = build_space(layout, checkpoint, "structured", 0.5), make_pruner(PrunerSpec(), "structured")
            splits = {
                split: _examples(checkpoint.kind, seed) for seed, split in enumerate(("calibration", "search", "test"))
            }
            walker = BlockWalker(load_model(checkpoint), layout)
            calibration = Calibration(
                walker=walker,
                checkpoint=checkpoint,
                layout=layout,
                space=space,
                pruner=pruner,
                examples=splits["calibration"].to_tensors(),
            )
            levels = prune_on_dense_inputs(calibration)
            store = create_store(tmp_path_factory.mktemp("store") / "levels", {}, levels)
            known[architecture] = (
                EngineSpec(checkpoint=checkpoint, layout=layout, space=space, store=store, pruner=pruner),
                splits,
            )
        return known[architecture]

    return make


def _mixed(space):
    """Return an allocation with something whole, something less and something gone in every tower."""
    return tuple((1, unit.num_levels - 1, 2, 0, 1)[place % 5] for place, unit in enumerate(space.units))


class Reference:
    """A whole model in float64 whose output projections are zero where columns are gone."""

    def __init__(self, spec):
        self.spec, self.kind, self.model = spec, spec.checkpoint.kind, load_model(spec.checkpoint).double()
        dense = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        sub_blocks = {sub_block.name: sub_block for sub_block in spec.layout.sub_blocks}
        self.modules = [sub_blocks[unit.name].output for unit in spec.space.units]
        self.levels = []
        for unit, module in zip(spec.space.units, self.modules, strict=True):
            whole, bias = dense[f"{module}.weight"], dense[f"{module}.bias"]
            compact, width, own = spec.store(unit.name), sub_blocks[unit.name].width, []
            for level, kept in enumerate(unit.kept):
                matrix = whole.clone() if level == 0 else torch.zeros_like(whole)
                for place, item in enumerate(compact["order"][:kept].tolist() if level and kept else ()):
                    columns = compact[f"output.{level}"][:, place * width : (place + 1) * width]
                    matrix[:, item * width : (item + 1) * width] = columns.double()
                own.append((matrix, bias if kept else torch.zeros_like(bias)))
            self.levels.append(own)

    def said(self, allocation, examples):
        """Return logits and states of the model at an allocation."""
        for place, level in enumerate(allocation):
            module, (weight, bias) = self.model.get_submodule(self.modules[place]), self.levels[place][level]
            module.weight, module.bias = (torch.nn.Parameter(each.clone()) for each in (weight, bias))
        inputs = {n: a.double() if a.is_floating_point() else a for n, a in examples.inputs.items()}
        if self.kind.reads == "pairs":
            outputs = self.model(**inputs)
            return None, torch.stack([outputs.text_embeds, outputs.image_embeds], 1)
        states = self.model.base_model(**inputs).last_hidden_state
        return self.model(**inputs).logits, states

    def loss(self, name, allocation, examples):
        """Return the mean loss, written out."""
        with torch.no_grad():
            logits, states = self.said(self.spec.space.dense, examples)
        own, found = self.said(allocation, examples)
        if name == "hidden":
            return (found - states).square().sum() / states.square().sum()
        if name == "nll":
            return functional.cross_entropy(own, examples.labels)
        log_p, log_q = logits.log_softmax(-1), own.log_softmax(-1)  # all classes are among the most probable ones
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def slopes(self, name, allocation, examples):
        """Return the first-order changes of the loss."""
        value = self.loss(name, allocation, examples)
        modules = [self.model.get_submodule(module) for module in self.modules]
        found = torch.autograd.grad(value, [p for module in modules for p in (module.weight, module.bias)])
        slopes = []
        for place, level in enumerate(allocation):
            own, gradients = self.levels[place][level], found[2 * place : 2 * place + 2]
            changes = [
                [(g * (b - a)).sum() for g, a, b in zip(gradients, own, t, strict=True)] for t in self.levels[place]
            ]
            slopes.append([float(sum(each)) for each in changes])
        return slopes


@pytest.mark.parametrize(("architecture", "loss"), PAIRS)
def test_measurements_and_slopes_are_those_of_the_whole_model(made, architecture, loss):
    spec, splits = made(architecture)
    reference, examples = Reference(spec), splits["search"].to_tensors()
    engine = Engine(dataclasses.replace(spec, loss=loss), splits)
    for allocation in (spec.space.dense, _mixed(spec.space), spec.space.sparsest):
        request = Request(allocation=allocation, tokens=COUNT * LENGTH, split="search")
        expected = float(reference.loss(loss, allocation, examples).detach())
        outcome = engine.measure(request)
        assert outcome.loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert len(outcome.sequence_losses) == COUNT
        assert ("nll" in outcome.measured) == (loss == "nll" or architecture == "ViTForImageClassification")
        if allocation != _mixed(spec.space):
            continue
        expansion = engine.measure(dataclasses.replace(request, probe="expansion"))
        assert expansion.loss == pytest.approx(expected, rel=1e-4)
        slopes = reference.slopes(loss, allocation, examples)
        most = max(abs(value) for row in slopes for value in row)
        for own, row in zip(expansion.expansion.slope, slopes, strict=True):
            assert own == pytest.approx(row, rel=1e-3, abs=1e-3 * most)


@pytest.mark.parametrize("architecture", CASES)
def test_prefixes_are_shared_and_features_are_of_every_tower(made, architecture):
    spec, splits = made(architecture)
    loss = CASES[architecture][0]
    mixed, count = _mixed(spec.space), COUNT * LENGTH
    late = (*spec.space.dense[: len(mixed) // 2], *mixed[len(mixed) // 2 :])
    asked = [
        Request(allocation=each, tokens=count, split="search", probe="influence")
        for each in (mixed, late, spec.space.dense)
    ]
    together = {o.request: o for o in Engine(dataclasses.replace(spec, loss=loss), splits).measure_batch(asked)}
    for request in asked:
        alone = Engine(dataclasses.replace(spec, loss=loss), splits).measure(request)
        assert alone.measured == together[request].measured
    influence = [together[asked[-1]].measured[f"influence.{block}"] for block in range(len(spec.layout.blocks))]
    walker, examples = BlockWalker(load_model(spec.checkpoint), spec.layout), splits["search"].to_tensors()
    state = walker.embed(examples)
    for block, found in enumerate(influence):
        entering, state = state, walker.run(block, state)
        ends = [walker.residual(block, each).double() for each in (entering, state)]
        assert found == pytest.approx(float((1 - functional.cosine_similarity(*ends, dim=-1)).mean()), rel=1e-5)

    blocks = len(spec.layout.blocks) - 1
    near = Request(allocation=mixed, tokens=count, split="search", blocks=blocks)
    found = Engine(dataclasses.replace(spec, loss=loss), splits).measure(near).measured[FEATURES]
    assert found > 0


def test_accuracy_is_the_share_of_labels_that_are_most_probable(made, tmp_path):
    spec, splits = made("ViTForImageClassification")
    from allocator.pruning.levels.execute import save_pruned

    save_pruned(_mixed(spec.space), spec.checkpoint, spec.layout, spec.space, spec.store, tmp_path / "out")
    found = Engine(dataclasses.replace(spec, store=None), splits).measure_checkpoint(
        tmp_path / "out", "test", COUNT * LENGTH
    )
    examples = splits["test"].to_tensors()
    with torch.no_grad():
        logits = load_model(read_checkpoint(tmp_path / "out"))(**examples.inputs).logits
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == examples.labels).double().mean()))
    assert found["nll"] == pytest.approx(float(functional.cross_entropy(logits, examples.labels)), rel=1e-5)
