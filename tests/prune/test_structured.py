import numpy as np
import pytest
import torch

from allocator.core.space import Unit
from allocator.prune.factorise import damped
from allocator.prune.removal import obs_order
from allocator.prune.statistics import Gram
from allocator.prune.structured import Obs, item_columns, refits


def _problem(seed, tokens, inputs, outputs, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) * rng.uniform(0.2, 2.0, size=inputs)
    return scale * rng.normal(size=(tokens, inputs)) @ mixing, rng.normal(size=(outputs, inputs))


def _stacked(x, damping):
    """Rows whose Gram matrix is the damped one."""
    return np.concatenate([x, np.sqrt(damping * np.mean((x**2).sum(0))) * np.eye(x.shape[1])])


def _least_squares(rows, weight, columns):
    """The columns of the refitted weight, and the squared error that is left."""
    solution, *_ = np.linalg.lstsq(rows[:, columns], rows @ weight.T, rcond=None)
    return solution.T, float(((rows @ weight.T - rows[:, columns] @ solution) ** 2).sum())


def _brute_force_order(rows, weight, width):
    """Remove, again and again, the item whose removal leaves the smallest exact least-squares error."""
    remaining, removed = list(range(weight.shape[1] // width)), []
    while remaining:
        errors = {}
        for item in remaining:
            columns = [c * width + k for c in remaining if c != item for k in range(width)]
            errors[item] = _least_squares(rows, weight, columns)[1] if columns else 0.0
        removed.append(min(errors, key=errors.get))
        remaining.remove(removed[-1])
    return removed[::-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("items", "width"), [(8, 1), (5, 3), (2, 4), (1, 2)])
def test_order_is_that_of_brute_force(seed, items, width):
    x, weight = _problem(seed, 40, items * width, 6)
    gram = damped(torch.from_numpy(x.T @ x), 0.01)
    order = obs_order(torch.from_numpy(weight), gram.inverse(), width)
    assert order.tolist() == _brute_force_order(_stacked(x, 0.01), weight, width)


def test_order_with_fewer_tokens_than_inputs_is_that_of_brute_force():
    x, weight = _problem(3, 5, 9, 4)
    order = obs_order(torch.from_numpy(weight), damped(torch.from_numpy(x.T @ x), 0.01).inverse(), 1)
    assert order.tolist() == _brute_force_order(_stacked(x, 0.01), weight, 1)


@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("kept", [[0], [4, 1, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_refit_is_least_squares(damping, kept):
    x, weight = _problem(1, 50, 10, 6)
    expected, _ = _least_squares(_stacked(x, damping), weight, kept)
    columns = torch.tensor([*kept, *sorted({*range(10)} - {*kept})])
    gram = damped(torch.from_numpy(x.T @ x), damping)
    (found,) = refits(torch.from_numpy(weight), gram, columns, [len(kept)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_refit_of_everything_is_the_dense_weight():
    x, weight = _problem(2, 50, 10, 6)
    gram = damped(torch.from_numpy(x.T @ x), 0.01)
    (found,) = refits(torch.from_numpy(weight), gram, torch.arange(10), [10])
    np.testing.assert_allclose(found.numpy(), weight, rtol=1e-9)


def _unit(kind, total, kept):
    return Unit("layers.0.mlp", kind, "mlp", 0, total, kept, kept, kept)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-8)])
def test_levels_are_refits_of_prefixes_to_the_precision_of_the_data_type(width, dtype, rtol):
    x, weight = _problem(4, 300, 8 * width, 12)
    stored, inputs = torch.from_numpy(weight).to(dtype), torch.from_numpy(x).float()
    statistics = Gram(8 * width)
    for batch in inputs.split(64):
        statistics.add(batch)
    levels = Obs(0.01).levels(_unit("channels", 8, (8, 6, 3, 1, 0)), width, stored, statistics, [1, 2, 3, 4])
    assert sorted(levels) == ["order", "output.1", "output.2", "output.3"]
    order = levels["order"].tolist()
    assert sorted(order) == list(range(8))
    rows = _stacked(inputs.double().numpy(), 0.01)
    for level, kept in ((1, 6), (2, 3), (3, 1)):
        columns = [item * width + k for item in order[:kept] for k in range(width)]
        expected, _ = _least_squares(rows, stored.double().numpy(), columns)
        found = levels[f"output.{level}"].to(dtype)
        error = np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)
        assert error < rtol


def test_only_wanted_levels_are_refitted():
    x, weight = _problem(4, 60, 8, 5)
    statistics = Gram(8)
    statistics.add(torch.from_numpy(x))
    weight, unit = torch.from_numpy(weight).float(), _unit("channels", 8, (8, 6, 3, 1, 0))
    every = Obs(0.01).levels(unit, 1, weight, statistics, [1, 2, 3, 4])
    one = Obs(0.01).levels(unit, 1, weight, statistics, [2])
    assert sorted(one) == ["order", "output.2"]
    assert torch.equal(one["output.2"], every["output.2"])
    assert sorted(Obs(0.01).levels(unit, 1, weight, statistics, [4])) == ["order"]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_dead_inputs_are_removed_first(scale):
    x, weight = _problem(5, 60, 8, 5, scale)
    x[:, [2, 6]] = 0.0
    weight[:, 2] *= 10
    statistics = Gram(8)
    statistics.add(torch.from_numpy(x))
    levels = Obs(0.01).levels(
        _unit("channels", 8, (8, 6, 4, 1)), 1, torch.from_numpy(weight).float(), statistics, [1, 2, 3]
    )
    order = levels["order"].tolist()
    assert set(order[6:]) == {2, 6}
    alive = [column for column in range(8) if column not in (2, 6)]
    np.testing.assert_allclose(levels["output.1"].numpy(), weight[:, order[:6]], rtol=1e-4)
    rows = np.concatenate([x, np.sqrt(0.01 * np.mean((x**2).sum(0))) * np.eye(8)])
    assert [item for item in order if item in alive] == [
        alive[item] for item in _brute_force_order(rows[:, alive], weight[:, alive], 1)
    ]


def test_inputs_that_are_all_dead_still_give_an_order():
    levels = Obs(0.01).levels(_unit("channels", 4, (4, 2, 0)), 1, torch.randn(3, 4), Gram(4), [1, 2])
    assert sorted(levels["order"].tolist()) == [0, 1, 2, 3]
    assert torch.isfinite(levels["output.1"]).all()


def test_item_columns():
    assert item_columns(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
