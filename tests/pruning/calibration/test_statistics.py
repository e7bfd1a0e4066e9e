import pytest
import torch
from torch import nn

from allocator.core.errors import UserError
from allocator.pruning.calibration.statistics import Gram, Norms, collect_statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_in_chunks_is_that_of_all_tokens_in_float64(dtype):
    x = (torch.randn(5000, 24, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    gram, norms = Gram(24), Norms(24)
    for chunk in x.split(129):
        gram.add(chunk)
        norms.add(chunk)
    exact = x.double().T @ x.double()
    assert float((gram.gram_ii.double() - exact).norm() / exact.norm()) < 1e-5
    torch.testing.assert_close(norms.square_i.double(), exact.diagonal(), rtol=1e-5, atol=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).requires_grad_(False)


def test_inputs_of_named_modules_are_collected(model):
    x = torch.randn(2, 5, 4)
    with collect_statistics(model, ["0", "2"], "gram") as statistics:
        model(x)
        model(x)
    assert sorted(statistics) == ["0", "2"]
    rows = x.reshape(-1, 4)
    torch.testing.assert_close(statistics["0"].gram_ii, 2 * rows.T @ rows)
    hidden = model[1](model[0](rows))
    torch.testing.assert_close(statistics["2"].gram_ii, 2 * hidden.T @ hidden)
    assert not any(module._forward_pre_hooks for module in model)


@pytest.mark.parametrize("need", ["gram", "norms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module(model, need, value):
    model[0].bias[1] = value
    with pytest.raises(UserError, match="the inputs of 2 are not all finite"), collect_statistics(model, ["2"], need):
        model(torch.randn(1, 5, 4))


def test_hooks_are_removed_after_an_error(model):
    with pytest.raises(RuntimeError, match="stop"):
        with collect_statistics(model, ["0"], "gram"):
            raise RuntimeError("stop")
    assert not model[0]._forward_pre_hooks
