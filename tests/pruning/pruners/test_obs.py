import numpy as np
import pytest
import torch

from allocator.core.space import Unit
from allocator.pruning.calibration.factorise import damp
from allocator.pruning.calibration.statistics import Gram
from allocator.pruning.levels.compact import item_columns
from allocator.pruning.pruners.obs import Obs, refit_columns
from allocator.pruning.pruners.removal import obs_order
from allocator.testing.problems import unit_problem


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
    gram = damp(torch.from_numpy(x.T @ x), 0.01)
    order = obs_order(torch.from_numpy(weight), gram.inverse(), width)
    assert order.tolist() == _brute_force_order(_stacked(x, 0.01), weight, width)


def test_order_with_fewer_tokens_than_inputs_is_that_of_brute_force():
    x, weight = _problem(3, 5, 9, 4)
    order = obs_order(torch.from_numpy(weight), damp(torch.from_numpy(x.T @ x), 0.01).inverse(), 1)
    assert order.tolist() == _brute_force_order(_stacked(x, 0.01), weight, 1)


@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("kept", [[0], [4, 1, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
def test_refit_is_least_squares(damping, kept):
    x, weight = _problem(1, 50, 10, 6)
    expected, _ = _least_squares(_stacked(x, damping), weight, kept)
    columns = torch.tensor([*kept, *sorted({*range(10)} - {*kept})])
    gram = damp(torch.from_numpy(x.T @ x), damping)
    (found,) = refit_columns(torch.from_numpy(weight), gram, columns, [len(kept)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_refit_of_everything_is_the_dense_weight():
    x, weight = _problem(2, 50, 10, 6)
    gram = damp(torch.from_numpy(x.T @ x), 0.01)
    (found,) = refit_columns(torch.from_numpy(weight), gram, torch.arange(10), [10])
    np.testing.assert_allclose(found.numpy(), weight, rtol=1e-9)


def _unit(kind, total, kept):
    return Unit(name="layers.0.mlp", kind=kind, part="mlp", block=0, total=total, kept=kept, params=kept, macs=kept)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-8)])
def test_levels_are_refits_of_prefixes_to_the_precision_of_the_data_type(width, dtype, rtol):
    x, weight = _problem(4, 300, 8 * width, 12)
    stored, inputs = torch.from_numpy(weight).to(dtype), torch.from_numpy(x).float()
    statistics = Gram(8 * width)
    for batch in inputs.split(64):
        statistics.add(batch)
    levels = Obs(0.01).levels(
        unit_problem(_unit("channels", 8, (8, 6, 3, 1, 0)), stored, statistics, [1, 2, 3, 4], width)
    )
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
    every = Obs(0.01).levels(unit_problem(unit, weight, statistics, [1, 2, 3, 4]))
    one = Obs(0.01).levels(unit_problem(unit, weight, statistics, [2]))
    assert sorted(one) == ["order", "output.2"]
    assert torch.equal(one["output.2"], every["output.2"])
    assert sorted(Obs(0.01).levels(unit_problem(unit, weight, statistics, [4]))) == ["order"]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_dead_inputs_are_removed_first(scale):
    x, weight = _problem(5, 60, 8, 5, scale)
    x[:, [2, 6]] = 0.0
    weight[:, 2] *= 10
    statistics = Gram(8)
    statistics.add(torch.from_numpy(x))
    levels = Obs(0.01).levels(
        unit_problem(_unit("channels", 8, (8, 6, 4, 1)), torch.from_numpy(weight).float(), statistics, [1, 2, 3])
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
    levels = Obs(0.01).levels(unit_problem(_unit("channels", 4, (4, 2, 0)), torch.randn(3, 4), Gram(4), [1, 2]))
    assert sorted(levels["order"].tolist()) == [0, 1, 2, 3]
    assert torch.isfinite(levels["output.1"]).all()


def test_item_columns():
    assert item_columns(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize("damping", [1e-4, 0.01])
def test_refits_of_nested_levels_are_each_least_squares(damping):
    x, weight = _problem(6, 60, 40, 7)
    columns = np.random.default_rng(6).permutation(40)
    counts = [40, 39, 31, 20, 9, 2, 1]
    gram = damp(torch.from_numpy(x.T @ x), damping)
    found = refit_columns(torch.from_numpy(weight), gram, torch.from_numpy(columns), counts)
    for count, kept in zip(counts, found, strict=True):
        expected, _ = _least_squares(_stacked(x, damping), weight, columns[:count])
        np.testing.assert_allclose(kept.numpy(), expected, rtol=1e-6, atol=1e-9)


def _gathered(x, batch=64):
    statistics = Gram(x.shape[1])
    for rows in torch.from_numpy(x).float().split(batch):
        statistics.add(rows)
    return statistics


def _heads(groups, per_group, kept):
    costs = tuple(kept)
    return Unit(
        name="layers.0.attn",
        kind="query_heads",
        part="attention",
        block=0,
        total=groups * per_group,
        kept=costs,
        params=costs,
        macs=costs,
        group=per_group,
    )


@pytest.mark.parametrize(("groups", "per_group", "width"), [(2, 4, 3), (3, 3, 1), (1, 5, 2), (4, 2, 2)])
def test_query_heads_keep_equally_many_of_every_group_with_least_squares_columns(groups, per_group, width):
    total = groups * per_group
    x, weight = _problem(7, 200, total * width, 10)
    unit = _heads(groups, per_group, [groups * k for k in range(per_group, -1, -1)])
    stored = torch.from_numpy(weight).float()
    levels = Obs(0.01).levels(unit_problem(unit, stored, _gathered(x), width=width))
    order = levels["order"].view(groups, per_group)
    assert sorted(levels) == sorted(["order", *(f"output.{k}" for k in range(1, per_group))])
    rows = _stacked(x.astype(np.float32).astype(float), 0.01)
    for level in range(1, per_group):
        kept = order[:, : per_group - level].flatten().tolist()
        assert [item // per_group for item in kept] == sorted(list(range(groups)) * (per_group - level))
        columns = [item * width + k for item in kept for k in range(width)]
        expected, _ = _least_squares(rows, stored.double().numpy(), columns)
        np.testing.assert_allclose(levels[f"output.{level}"].numpy(), expected, rtol=1e-4, atol=1e-5)


def _least_squares_with_intercept(x, weight, columns, damping):
    """Columns and bias of one joint least-squares fit; the damping is that of the centred inputs."""
    centred, mean = x - x.mean(0), x.mean(0)
    ridge = np.sqrt(damping * np.mean((centred**2).sum(0))) * np.eye(x.shape[1])
    inputs = np.block([[x, np.ones((len(x), 1))], [ridge, np.zeros((x.shape[1], 1))]])
    wanted = np.concatenate([x @ weight.T, ridge @ weight.T])
    solution, *_ = np.linalg.lstsq(inputs[:, [*columns, x.shape[1]]], wanted, rcond=None)
    return solution[:-1].T, solution[-1], mean


@pytest.mark.parametrize("groups", [None, 2])
def test_bias_and_columns_are_one_least_squares_fit(groups):
    x, weight = _problem(8, 400, 8, 6)
    x = (x + np.random.default_rng(8).normal(size=8) * 3).astype(np.float32).astype(float)
    stored = torch.from_numpy(weight).float()
    unit = _unit("channels", 8, (8, 6, 2, 0)) if groups is None else _heads(groups, 8 // groups, (8, 6, 2, 0))
    levels = Obs(0.01, bias=True).levels(unit_problem(unit, stored, _gathered(x), [1, 2, 3]))
    assert sorted(levels) == ["bias.1", "bias.2", "order", "output.1", "output.2"]
    for level, count in ((1, 6), (2, 2)):
        parts = groups or 1
        kept = levels["order"].view(parts, -1)[:, : count // parts].flatten().tolist()
        columns, bias, mean = _least_squares_with_intercept(x, stored.double().numpy(), kept, 0.01)
        np.testing.assert_allclose(levels[f"output.{level}"].numpy(), columns, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(levels[f"bias.{level}"].numpy(), bias, rtol=1e-4, atol=1e-4)
        outputs = levels[f"output.{level}"].numpy() @ mean[kept] + levels[f"bias.{level}"].numpy()
        np.testing.assert_allclose(outputs, stored.double().numpy() @ mean, rtol=1e-4, atol=1e-4)


def test_with_bias_the_order_is_that_of_brute_force_on_centred_inputs():
    x, weight = _problem(9, 200, 8, 6)
    x += np.random.default_rng(9).normal(size=8) * 3
    levels = Obs(0.01, bias=True).levels(
        unit_problem(_unit("channels", 8, (8, 4)), torch.from_numpy(weight).float(), _gathered(x), [1])
    )
    assert levels["order"].tolist() == _brute_force_order(_stacked(x - x.mean(0), 0.01), weight, 1)


@pytest.mark.parametrize("constant", [0.0, 0.1, 300.0])
def test_with_bias_inputs_that_do_not_vary_go_first_and_cost_nothing(constant):
    x, weight = _problem(10, 4000, 8, 5)
    x[:, [1, 5]] = np.float32(constant)
    weight[:, 1] *= 10
    stored = torch.from_numpy(weight).float()
    levels = Obs(0.01, bias=True).levels(
        unit_problem(_unit("channels", 8, (8, 7, 6, 3)), stored, _gathered(x), [1, 2, 3])
    )
    order = levels["order"].tolist()
    assert set(order[6:]) == {1, 5}
    for level, count in ((1, 7), (2, 6)):
        found = x[:, order[:count]] @ levels[f"output.{level}"].numpy().T + levels[f"bias.{level}"].numpy()
        np.testing.assert_allclose(found, x @ stored.double().numpy().T, rtol=1e-4, atol=1e-4 * max(1.0, constant))
    assert torch.isfinite(levels["output.3"]).all()
