import pytest
import torch

from allocator.core.errors import UserError
from allocator.core.notify import silent
from allocator.pruning.calibration.factorise import damp, factorise


def test_damping_is_a_share_of_the_mean_diagonal_and_dead_inputs_get_a_unit():
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = gram + torch.diag(torch.tensor([0.2, 0.2, 1.0], dtype=torch.float64))
    assert torch.equal(damp(gram, 0.1), expected)


def test_the_factor_is_that_of_the_damped_matrix():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    factor = factorise(inputs.T @ inputs, 0.01, "unit", silent)
    torch.testing.assert_close(factor.cholesky_ii @ factor.cholesky_ii.T, factor.gram_ii)
    torch.testing.assert_close(factor.inverse() @ factor.gram_ii, torch.eye(5, dtype=torch.float64))
    assert factor.damping == 0.01


def test_a_rank_deficient_hessian_needs_no_more_than_the_setting():
    inputs = torch.ones(3, 6, dtype=torch.float64)
    heard = []
    assert factorise(inputs.T @ inputs, 0.01, "unit", heard.append).damping == 0.01
    assert heard == []


def test_every_step_of_more_damping_is_reported():
    gram = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)  # eigenvalues 4 and -2
    heard = []
    factor = factorise(gram, 0.01, "layers.3.mlp", heard.append)
    assert factor.damping == pytest.approx(10.0)
    assert len(heard) == 3
    assert heard[0].startswith("layers.3.mlp: the Hessian is not positive definite with damping 0.01; trying 0.1")


def test_a_hessian_beyond_help_is_an_error_with_the_remedy():
    heard = []
    with pytest.raises(
        UserError, match=r"layers\.3\.mlp: the Hessian.*cannot be factorised.*more calibration text"
    ) as error:
        factorise(torch.full((2, 2), float("nan")), 0.01, "layers.3.mlp", heard.append)
    assert heard[-1].endswith("trying 100000")
    assert "even with damping 100000." in str(error.value)
