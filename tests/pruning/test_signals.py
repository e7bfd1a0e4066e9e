"""Signals against what hooks on the stock model see, computed anew in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.core.errors import UserError
from allocator.core.signals import QUANTILES, SIGNALS, Signals
from allocator.model.data.examples import Examples
from allocator.model.live.stream import StreamedWalker
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.signals import collect, hill_exponent

WANTED = [name for name in SIGNALS if name != "gradient"]
MATRICES = {"dims", "magnitude", "lamp"}


class Direct:
    """Inputs of every linear layer [tokens, in], and the residual stream at every block's doors, in float64."""

    def __init__(self, case):
        model = AutoModelForCausalLM.from_pretrained(case.checkpoint.folder, dtype=torch.float64)
        self.blocks = list(model.model.layers)
        self.inputs, self.doors = {}, []
        self.weights = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for name in self.weights:
            model.get_submodule(name).register_forward_pre_hook(
                lambda m, args, name=name: self.inputs.update({name: args[0].flatten(0, 1)})
            )
        for block in self.blocks:
            block.register_forward_hook(
                lambda m, args, output: self.doors.append((args[0], output[0] if isinstance(output, tuple) else output))
            )
        with torch.no_grad():
            model(case.tokens)

    def scores(self, block):
        """All Wanda scores of a block."""
        own = [n for n in self.weights if n.startswith(f"model.layers.{block}.")]
        return np.concatenate([(self.weights[n].abs() * self.inputs[n].norm(dim=0)).flatten().numpy() for n in own])


@pytest.fixture(scope="module")
def direct(structured):
    return Direct(structured)


@pytest.fixture(scope="module")
def found(structured):
    return collect(structured.calibration(), [name for name in WANTED if name not in MATRICES])


@pytest.fixture(scope="module")
def found_of_matrices(make_case, tiny_model):
    case = make_case(tiny_model, "unstructured", "magnitude")
    return case.space, collect(case.calibration(), [name for name in WANTED if name != "fluctuation"])


def test_scores(direct, found):
    for block in range(3):
        scores = direct.scores(block)
        assert found["outliers"][block] == pytest.approx((scores > 5 * scores.mean()).mean(), abs=2 / len(scores))
        assert found["median"][block] == pytest.approx(np.median(scores), rel=1e-3)  # of even numbers the lower
    assert found["outliers"].max() > 0


def test_residuals(direct, found):
    for block, (entering, leaving) in enumerate(direct.doors):
        a, b = entering.flatten(0, 1).numpy(), leaving.flatten(0, 1).numpy()
        cosines = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        assert found["influence"][block] == pytest.approx(np.mean(1 - cosines), rel=1e-4)
        assert found["angle"][block] == pytest.approx(np.mean([math.acos(c) / math.pi for c in cosines]), rel=1e-4)


def test_hill_exponents(direct, found):
    for block in range(3):
        exponents = []
        for name, weight in direct.weights.items():
            if name.startswith(f"model.layers.{block}."):
                eigenvalues = np.sort(np.linalg.svd(weight.numpy(), compute_uv=False) ** 2)
                n, k = len(eigenvalues), len(eigenvalues) // 2
                logs = [math.log(eigenvalues[n - i] / eigenvalues[n - k - 1]) for i in range(1, k + 1)]
                exponents.append(1 + k / sum(logs))
        assert found["hill"][block] == pytest.approx(np.mean(exponents), rel=1e-4)


def test_fluctuation(structured, direct, found):
    widths = {"attention": ("self_attn.o_proj", 2, 16), "mlp": ("mlp.down_proj", 48, 1)}
    for row, unit in zip(found["fluctuation"], structured.space.units, strict=True):
        module, items, width = widths[unit.part]
        name = f"model.layers.{unit.block}.{module}"
        score = direct.inputs[name].numpy().var(axis=0) * (direct.weights[name].numpy() ** 2).sum(axis=0)
        standard = ((score - score.mean()) / score.std(ddof=1)).reshape(items, width).mean(axis=1)
        np.testing.assert_allclose(row[:items], standard, rtol=1e-3, atol=1e-4)
        assert np.isnan(row[items:]).all()


def test_matrices(direct, found_of_matrices):
    space, signals = found_of_matrices
    for index, unit in enumerate(space.units):
        weight = direct.weights[unit.name].numpy()
        ordered = np.sort(np.abs(weight).flatten())
        assert tuple(signals["dims"][index]) == weight.shape
        ranks = np.round(np.linspace(0, weight.size - 1, QUANTILES + 1)).astype(int)
        np.testing.assert_allclose(signals["magnitude"][index], ordered[ranks], rtol=1e-6)
        lamp = [ordered[rank] ** 2 / (ordered[rank:] ** 2).sum() for rank in ranks]
        np.testing.assert_allclose(signals["lamp"][index], lamp, rtol=1e-6)
        assert (np.diff(signals["lamp"][index]) >= 0).all()


def test_patterns_agree_on_what_concerns_blocks(found, found_of_matrices):
    for name in ("outliers", "median", "hill", "influence", "angle"):
        np.testing.assert_array_equal(found[name], found_of_matrices[1][name])


def test_a_streamed_model_gives_the_same_and_progress_is_told(structured, found):
    steps = []
    walker = StreamedWalker(structured.checkpoint, structured.layout)
    calibration = Calibration(
        walker=walker,
        checkpoint=structured.checkpoint,
        layout=structured.layout,
        space=structured.space,
        pruner=structured.pruner,
        examples=Examples.from_ids(structured.tokens),
        progress=steps.append,
    )
    again = collect(calibration, list(found.values))
    for name, value in found.values.items():
        np.testing.assert_array_equal(again[name], value)
    assert steps == [1, 2, 3]


def test_only_what_is_wanted_is_there(structured):
    signals = collect(structured.calibration(), ["hill"])
    assert set(signals.values) == {"hill"}
    assert signals.missing(["hill", "angle"]) == {"angle"}


def test_hill_of_odd_matrices():
    assert hill_exponent(torch.eye(6)) > 1e6
    assert math.isfinite(hill_exponent(torch.zeros(4, 8)))
    assert math.isfinite(hill_exponent(torch.ones(1, 5)))
    heavy = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
    light = torch.diag(torch.tensor([1.2, 1.1, 1.0, 1.0]))
    assert hill_exponent(heavy) < hill_exponent(light)


def test_signals_come_back_from_their_file(found, tmp_path):
    path = tmp_path / "signals.npz"
    found.save(path)
    again = Signals.load(path)
    assert set(again.values) == set(found.values)
    for name, value in found.values.items():
        np.testing.assert_array_equal(again[name], value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="Delete it"):
        Signals.load(path)
