"""Slopes and sizes, against whole models in float64 whose weights are put together by hand and differentiated."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from allocator.core.effort import EXPANSION_POSITIONS
from allocator.core.errors import UserError
from allocator.core.protocols import Request
from allocator.evaluation import loss as losses
from allocator.evaluation import teacher
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.pruning.levels.execute import save_pruned

LOSSES = ("kl", "topk_kl", "nll", "hidden")
TOP = 16
HEADS = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
CASES = {
    "structured": ("llama", {"num_hidden_layers": 3}, {}),
    "unstructured": ("qwen2", {"tie_word_embeddings": False}, {"pattern": "unstructured"}),
    "n:m": ("llama", {}, {"pattern": "n:m"}),
    "query heads": ("qwen2", {**HEADS, "tie_word_embeddings": False}, {"attention": "query_heads"}),
    "norms of heads": ("qwen3", HEADS, {"attention": "query_heads", "bias": True}),
    "added biases": ("llama", {}, {"bias": True}),
    "biases of its own": ("llama", {"attention_bias": True, "mlp_bias": True}, {"bias": True}),
    "no module of its own": ("opt", {}, {}),
    "norms over all heads": ("olmo2", {}, {}),
}
SEQUENCES = 18
TOKENS = SEQUENCES * 32
"""More than an expansion takes sizes from, and not a whole number of batches of sequences."""


@pytest.fixture(scope="module")
def made(make_model, make_spec):
    """Makes a case by its name, once."""
    specs = {}

    def make(name) -> EngineSpec:
        if name not in specs:
            kind, overrides, pruning = CASES[name]
            specs[name] = make_spec(make_model(kind, **overrides), **pruning)
        return specs[name]

    return make


@pytest.fixture(scope="module")
def texts(splits):
    ids = np.random.default_rng(11).integers(0, 128, size=(SEQUENCES, 32))
    return {**splits, "search": Examples.from_ids(ids), "other": Examples.from_ids(ids[::-1])}


@pytest.fixture(params=CASES)
def spec(request, made):
    return made(request.param)


@pytest.fixture(params=LOSSES)
def loss(request, monkeypatch):
    monkeypatch.setattr(losses, "TOP", TOP)
    return request.param


def _allocations(space):
    """Whole, emptiest, and of everything something: a wholly removed unit before, between and after others."""
    count = len(space.units)
    ladder = [unit.num_levels - 1 for unit in space.units]
    mixed = tuple((1, ladder[index], min(2, ladder[index]), 0, ladder[index] // 2)[index % 5] for index in range(count))
    turned = tuple((0, 1, ladder[index])[index % 3] for index in range(count))
    return [space.dense, space.sparsest, mixed, turned]


def _norm(module, states):
    return module.weight * states * (states.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


class Reference:
    """The whole model in float64, each unit's matrix a mixture of two levels, rows and columns where they always were.

    Levels of structured units are dense matrices with zeros where columns are gone; those of matrices are read from
    saved checkpoints.
    """

    def __init__(self, spec, tmp_path):
        self.spec, self.space = spec, spec.space
        self.model = load_model(spec.checkpoint).double()
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_norm, module)  # the stock one computes in float32
        self._dense = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        sub_blocks = {sub_block.name: sub_block for sub_block in spec.layout.sub_blocks}
        self.modules = [sub_blocks[u.name].output if u.name in sub_blocks else u.name for u in self.space.units]
        self.levels: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        if self.space.units[0].kind == "matrix":
            saved = []
            for level in range(max(unit.num_levels for unit in self.space.units)):
                own = tuple(min(level, unit.num_levels - 1) for unit in self.space.units)
                save_pruned(own, spec.checkpoint, spec.layout, self.space, spec.store, tmp_path / str(level))
                saved.append(load_file(tmp_path / str(level) / "model.safetensors"))
            for unit in self.space.units:
                matrices = [saved[level][f"{unit.name}.weight"].double() for level in range(unit.num_levels)]
                self.levels.append([(matrix, self._bias(unit.name)) for matrix in matrices])
        else:
            for unit in self.space.units:
                self.levels.append([self._structured(sub_blocks[unit.name], unit, n) for n in range(unit.num_levels)])

    def _bias(self, module):
        found = self._dense.get(f"{module}.bias")
        return torch.zeros(len(self._dense[f"{module}.weight"]), dtype=torch.float64) if found is None else found

    def _structured(self, sub_block, unit, level):
        whole, bias = self._dense[f"{sub_block.output}.weight"], self._bias(sub_block.output)
        if level == 0:
            return whole, bias
        if unit.kept[level] == 0:
            return torch.zeros_like(whole), torch.zeros_like(bias)
        compact = self.spec.store(unit.name)
        order = compact["order"].view(-1, unit.group or unit.total)
        kept = order[:, : unit.kept[level] // len(order)].flatten()
        matrix = torch.zeros_like(whole)
        for place, item in enumerate(kept.tolist()):
            own = compact[f"output.{level}"][:, place * sub_block.width : (place + 1) * sub_block.width]
            matrix[:, item * sub_block.width : (item + 1) * sub_block.width] = own.double()
        return matrix, bias + compact[f"bias.{level}"].double() if f"bias.{level}" in compact else bias

    def put(self, allocation, towards=None, step=0.0):
        """Put units at their levels, and one of them some way towards another level."""
        for place, (name, level) in enumerate(zip(self.modules, allocation, strict=True)):
            weight, bias = self.levels[place][level]
            if towards is not None and towards[0] == place:
                there = self.levels[place][towards[1]]
                weight, bias = (a + step * (b - a) for a, b in zip((weight, bias), there, strict=True))
            module = self.model.get_submodule(name)
            module.weight = torch.nn.Parameter(weight.clone())
            module.bias = torch.nn.Parameter(bias.clone())
        return self

    def outputs(self, ids):
        out = self.model(torch.from_numpy(ids.copy()), use_cache=False, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    def teach(self, ids):
        with torch.no_grad():
            return self.put(self.space.dense).outputs(ids)

    def loss(self, name, ids, taught):
        """Return the mean loss, written out."""
        logits, states = self.outputs(ids)
        if name == "hidden":
            return (states - taught[1]).square().sum() / taught[1].square().sum()
        if name == "nll":
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(ids.copy())[:, 1:].flatten())
        log_p, log_q = taught[0].log_softmax(-1), logits.log_softmax(-1)
        if name == "topk_kl":
            top = log_p.topk(TOP).indices
            log_p, log_q = (
                torch.cat([x.gather(-1, top), (1 - x.gather(-1, top).exp().sum(-1, keepdim=True)).log()], -1)
                for x in (log_p, log_q)
            )
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def slopes(self, allocation, name, ids):
        """Return the loss and the first-order changes, by differentiating the whole model at once."""
        taught = self.teach(ids)
        value = self.put(allocation).loss(name, ids, taught)
        modules = [self.model.get_submodule(module) for module in self.modules]
        found = torch.autograd.grad(value, [p for module in modules for p in (module.weight, module.bias)])
        slopes = []
        for place, level in enumerate(allocation):
            own = self.levels[place][level]
            gradients = found[2 * place : 2 * place + 2]
            slopes.append(
                [
                    sum(float((g * (b - a)).sum()) for g, a, b in zip(gradients, own, there, strict=True))
                    for there in self.levels[place]
                ]
            )
        return float(value.detach()), slopes

    @torch.no_grad()
    def sizes(self, allocation, ids):
        """Return mean squared changes of outputs on evenly spaced positions."""
        heard = {}
        self.put(allocation)
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: heard.update({name: args[0].flatten(0, -2)})
            )
            for name in self.modules
        ]
        self.outputs(ids)
        for handle in handles:
            handle.remove()
        every = 1
        while -(-ids.size // every) > EXPANSION_POSITIONS:
            every += 1
        places = torch.arange(every // 2, ids.size, every)
        sizes = []
        for place, level in enumerate(allocation):
            inputs = heard[self.modules[place]][places]
            own = functional.linear(inputs, *self.levels[place][level])
            there = [functional.linear(inputs, *other) for other in self.levels[place]]
            sizes.append([float((other - own).square().sum() / len(inputs)) for other in there])
        return sizes


def _expand(spec, texts, allocation, tokens=TOKENS, split="search"):
    return Engine(spec, texts).measure(Request(allocation=allocation, tokens=tokens, split=split, probe="expansion"))


def _close(found, expected, rel):
    """Whether all rows agree, relative to the largest of each row, or of all where a row is small."""
    most = max(abs(value) for row in expected for value in row)
    assert len(found) == len(expected)
    for own, row in zip(found, expected, strict=True):
        assert own == pytest.approx(row, rel=rel, abs=rel * most / 100)


def _check_slopes(spec, texts, tmp_path, loss):
    reference = Reference(spec, tmp_path)
    for allocation in _allocations(spec.space):
        outcome = _expand(dataclasses.replace(spec, loss=loss), texts, allocation)
        value, slopes = reference.slopes(allocation, loss, texts["search"].inputs["input_ids"])
        assert outcome.loss == pytest.approx(value, rel=1e-4, abs=1e-7)
        if allocation == spec.space.dense and loss != "nll":
            # there the gradient is zero, and what is found is rounding
            scale = max(max(row) for row in outcome.expansion.size)
            assert max(abs(value) for row in outcome.expansion.slope for value in row) < 1e-4 * scale
        else:
            _close(outcome.expansion.slope, slopes, 1e-3)
    return reference


def test_slopes_are_those_of_a_whole_model_in_float64(spec, texts, tmp_path):
    _check_slopes(spec, texts, tmp_path, "kl")


@pytest.mark.parametrize("loss", LOSSES[1:], indirect=True)
@pytest.mark.parametrize("name", ["structured", "unstructured"])
def test_slopes_of_every_other_loss_are_those_of_a_whole_model_in_float64(made, texts, tmp_path, name, loss):
    _check_slopes(made(name), texts, tmp_path, loss)


def test_sizes_are_mean_squared_changes_of_outputs_on_evenly_spaced_positions(spec, texts, tmp_path):
    reference = Reference(spec, tmp_path)
    for allocation in _allocations(spec.space):
        for sequences in (SEQUENCES, 5):
            outcome = _expand(spec, texts, allocation, sequences * 32)
            sizes = reference.sizes(allocation, texts["search"][:sequences].inputs["input_ids"])
            _close(outcome.expansion.size, sizes, 1e-4)


@pytest.mark.parametrize("name", ["structured", "unstructured", "query heads", "added biases"])
def test_the_loss_changes_by_the_slope_along_a_small_step(made, texts, tmp_path, name, loss):
    """By central differences of the loss of whole models in float64, which know of no gradient."""
    spec, step = dataclasses.replace(made(name), loss=loss), 1e-4
    reference, ids = Reference(spec, tmp_path), texts["search"][:5].inputs["input_ids"]
    allocation = _allocations(spec.space)[2]
    slopes = _expand(spec, texts, allocation, 5 * 32).expansion.slope
    expected = []
    with torch.no_grad():
        taught = reference.teach(ids)
        for place, unit in enumerate(spec.space.units):
            ends = [
                [float(reference.put(allocation, (place, level), way).loss(loss, ids, taught)) for way in (step, -step)]
                for level in range(unit.num_levels)
            ]
            expected.append([(ahead - behind) / (2 * step) for ahead, behind in ends])
    _close(slopes, expected, 1e-3)


def test_both_are_zero_at_a_units_own_level_alone(spec, texts):
    for allocation in _allocations(spec.space):
        expansion = _expand(spec, texts, allocation, 64).expansion
        for unit, own, slope, size in zip(spec.space.units, allocation, expansion.slope, expansion.size, strict=True):
            assert len(slope) == len(size) == unit.num_levels
            assert (slope[own], size[own]) == (0.0, 0.0)
            assert all(value > 0 for level, value in enumerate(size) if level != own)
            assert allocation == spec.space.dense or all(value for level, value in enumerate(slope) if level != own)


ENGINES = [
    *(("structured", loss, "float32") for loss in LOSSES),
    ("unstructured", "hidden", "float32"),
    ("query heads", "topk_kl", "float32"),
    ("biases of its own", "nll", "float32"),
    ("structured", "kl", "bfloat16"),
    ("unstructured", "hidden", "bfloat16"),
]


@pytest.fixture(params=ENGINES, ids=", ".join)
def engine_spec(request, made, monkeypatch):
    monkeypatch.setattr(losses, "TOP", TOP)
    name, loss, dtype = request.param
    return dataclasses.replace(made(name), loss=loss, dtype=dtype)


def test_the_loss_is_that_of_a_plain_measurement_which_stays_as_it_was(engine_spec, texts):
    engine, rel = Engine(engine_spec, texts), 1e-5 if engine_spec.dtype == "float32" else 0.02
    for allocation in _allocations(engine_spec.space):
        request = Request(allocation=allocation, tokens=5 * 32)
        before = engine.measure(request)
        outcome = engine.measure(dataclasses.replace(request, probe="expansion"))
        after = engine.measure(request)
        assert outcome.request.probe == "expansion"
        assert outcome.measured.keys() == before.measured.keys()
        for name, value in before.measured.items():
            assert outcome.measured[name] == pytest.approx(value, rel=rel, abs=1e-6 if rel < 0.01 else 1e-3)
        assert outcome.sequence_losses == pytest.approx(
            before.sequence_losses, rel=2 * rel, abs=1e-6 if rel < 0.01 else 1e-3
        )
        assert before.expansion is after.expansion is None
        assert (after.measured, after.sequence_losses) == (before.measured, before.sequence_losses)


def test_an_expansion_depends_neither_on_what_was_measured_before_nor_on_its_batch(engine_spec, texts):
    allocations = _allocations(engine_spec.space)
    plain = [
        Request(allocation=allocation, tokens=64, split=split)
        for allocation in allocations
        for split in ("search", "other")
    ]
    asked = [dataclasses.replace(request, probe="expansion") for request in plain]
    expected = {r.key: _measured(Engine(engine_spec, texts).measure(r)) for r in [*plain, *asked]}
    used = Engine(engine_spec, texts)
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(2 * len(plain))
        batch = [[*plain, *asked][index] for index in order]
        outcomes = list(used.measure_batch(batch))
        assert sorted(o.request.key for o in outcomes) == sorted(expected)
        for outcome in outcomes:
            assert _measured(outcome) == expected[outcome.request.key]


def _measured(outcome):
    return outcome.measured, outcome.sequence_losses, outcome.expansion


def test_targets_kept_or_recomputed_give_the_same_expansion(made, texts, loss, monkeypatch):
    spec = dataclasses.replace(made("structured"), loss=loss)
    request = Request(allocation=_allocations(spec.space)[2], tokens=5 * 32, probe="expansion")
    kept = _measured(Engine(spec, texts).measure(request))
    monkeypatch.setattr(teacher, "KEPT_BYTES", 0)
    assert _measured(Engine(spec, texts).measure(request)) == kept


def test_what_puts_a_wholly_removed_unit_back_is_as_large_as_what_removes_it(made, texts):
    """Its inputs are the same, whatever it writes."""
    spec = made("biases of its own")
    for place, unit in enumerate(spec.space.units):
        gone, there = (
            tuple(level if index == place else 1 for index in range(len(spec.space.units)))
            for level in (unit.num_levels - 1, 0)
        )
        back, away = (_expand(spec, texts, allocation, 64).expansion.size[place] for allocation in (gone, there))
        assert back[0] == pytest.approx(away[-1], rel=1e-5)
        assert min(back[:-1]) > 0


def test_in_bfloat16_slopes_and_sizes_are_nearly_those_of_float32(made, texts):
    for name in ("structured", "unstructured"):
        exact = made(name)
        coarse = dataclasses.replace(exact, dtype="bfloat16")
        for allocation in _allocations(exact.space)[1:]:
            one, other = (_expand(spec, texts, allocation).expansion for spec in (exact, coarse))
            for found, expected in ((other.slope, one.slope), (other.size, one.size)):
                found, expected = (np.concatenate(rows) for rows in (found, expected))
                assert np.corrcoef(found, expected)[0, 1] > 0.99
                assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_gradient_that_is_not_finite_is_an_error(make_model, make_spec, texts, tmp_path):
    """In float16 a loss may be finite where its gradient, through the norm of tiny states, is not."""
    folder = shutil.copytree(make_model("qwen2", tie_word_embeddings=False, rms_norm_eps=1e-12), tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        if any(name in key for name in ("embed_tokens", "o_proj", "down_proj")):
            tensors[key] *= 1e-5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spec = dataclasses.replace(make_spec(folder, "n:m"), dtype="float16")
    engine, request = Engine(spec, texts), Request(allocation=spec.space.sparsest, tokens=64)
    assert np.isfinite(engine.measure(request).loss)
    with pytest.raises(UserError, match="gradient of the loss is not finite"):
        engine.measure(dataclasses.replace(request, probe="expansion"))
