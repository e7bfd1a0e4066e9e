"""SparseGPT against the same problem solved directly, in float64."""

import numpy as np
import pytest
import torch

from allocator.core.notify import silent
from allocator.core.space import Unit
from allocator.pruning.calibration.factorise import damp
from allocator.pruning.calibration.statistics import KINDS, Gram
from allocator.pruning.levels.masks import sparse_weight
from allocator.pruning.pruners import sparsegpt
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner
from allocator.pruning.pruners.sparsegpt import SparseGpt, inverse_factor
from allocator.testing.problems import unit_problem


def _problem(seed, tokens, inputs, outputs):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) * rng.uniform(0.2, 2.0, size=inputs)
    return rng.normal(size=(tokens, inputs)) @ mixing, rng.normal(size=(outputs, inputs))


def _unit(rows, columns, kept, group=None):
    total = rows * columns
    kept = (total, *kept)
    return Unit(
        name="layers.0.mlp.up_proj",
        kind="matrix",
        part="mlp",
        block=0,
        total=total,
        kept=kept,
        params=kept,
        macs=kept,
        group=group,
    )


def _gram(x):
    statistics = Gram(x.shape[1])
    for batch in torch.from_numpy(x).float().split(64):
        statistics.add(batch)
    return statistics


def _prune(unit, weight, statistics, wanted=None, damping=0.01):
    weight = torch.from_numpy(weight).float()
    wanted = range(1, unit.num_levels) if wanted is None else wanted
    compact = SparseGpt(damping).levels(unit_problem(unit, weight, statistics, wanted))
    return {level: sparse_weight(compact, level, weight).double().numpy() for level in wanted}


def _reference(weight, hessian, removal, block, group=None):
    """One level: whole columns in order, each removal made up for by a fresh inverse over what is to come."""
    weight, (rows, columns) = weight.copy(), weight.shape
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    prices = np.array([inverse[0, 0] for inverse in inverses])
    gone = np.zeros(weight.shape, dtype=bool)
    for j in range(columns):
        if group is None and j % block == 0:
            end = min(j + block, columns)
            quota = removal * end // columns - removal * j // columns
            found = sorted((weight[r, c] ** 2 / prices[c], r, c) for r in range(rows) for c in range(j, end))
            for _, row, column in found[:quota]:
                gone[row, column] = True
        if group is not None and j % group == 0:
            for row in range(rows):
                found = sorted((weight[row, c] ** 2 / prices[c], c) for c in range(j, j + group))
                for _, column in found[: removal * group // weight.size]:
                    gone[row, column] = True
        for row in range(rows):
            if gone[row, j]:
                weight[row, j:] -= weight[row, j] / prices[j] * inverses[j][0]
                weight[row, j] = 0.0
    return weight, gone


CASES = [(None, (96, 70, 51, 12, 0)), (2, (72,)), (4, (108, 72, 36, 0)), (3, (96, 48)), (12, (60, 24)), (24, (30, 6))]


@pytest.mark.parametrize("block", [5, 8, 128])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("group", "kept"), CASES)
def test_levels_are_those_of_sequential_updates(monkeypatch, block, seed, group, kept):
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    x, weight = _problem(seed, 90, 24, 6)
    unit, statistics = _unit(6, 24, kept, group), _gram(x)
    hessian = damp(statistics.gram_ii.double(), 0.01).numpy()
    for level, found in _prune(unit, weight, statistics).items():
        expected, gone = _reference(np.float32(weight).astype(float), hessian, 144 - kept[level - 1], block, group)
        np.testing.assert_array_equal(found == 0.0, gone)
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(("group", "kept"), [(None, 298), (4, 300)])
def test_blocks_of_full_size(group, kept):
    x, weight = _problem(7, 400, 300, 2)
    unit, statistics = _unit(2, 300, (kept,), group), _gram(x)
    expected, gone = _reference(
        np.float32(weight).astype(float), damp(statistics.gram_ii.double(), 0.01).numpy(), 600 - kept, 128, group
    )
    found = _prune(unit, weight, statistics)[1]
    np.testing.assert_array_equal(found == 0.0, gone)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_the_factor_is_that_of_the_inverse():
    x, _ = _problem(1, 30, 12, 1)
    gram = torch.from_numpy(x.T @ x)
    upper = inverse_factor(gram, 0.01, "unit", silent)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.T @ upper, damp(gram, 0.01).inverse(), rtol=1e-9, atol=0)


def test_the_last_column_cannot_be_made_up_for_and_the_others_are_least_squares():
    """One row, its first column removed: what is left is the least-squares fit on the other columns."""
    x, weight = _problem(2, 60, 5, 1)
    weight[0, 0] = 1e-3
    rows = np.concatenate([x, np.sqrt(0.01 * np.mean((x**2).sum(0))) * np.eye(5)])
    solution, *_ = np.linalg.lstsq(rows[:, 1:], rows @ weight[0], rcond=None)
    found = _prune(_unit(1, 5, (4,)), weight, _gram(x))[1][0]
    np.testing.assert_allclose(found, [0.0, *solution], rtol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
def test_it_errs_less_than_wanda(group):
    x, weight = _problem(3, 500, 64, 32)
    unit, dense = _unit(32, 64, (1024,), group), torch.from_numpy(weight).float()
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        pruner = make_pruner(PrunerSpec(name=name), "n:m")
        statistics = KINDS[pruner.need](64, torch.device("cpu"))
        statistics.add(torch.from_numpy(x).float())
        found = sparse_weight(pruner.levels(unit_problem(unit, dense, statistics, [1])), 1, dense).double().numpy()
        errors[name] = np.linalg.norm(x @ (found - weight).T)
    assert errors["sparsegpt"] < 0.95 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("group", [None, 4])
def test_dead_inputs_go_first_and_keep_their_weights_where_kept(group):
    x, weight = _problem(4, 60, 8, 5)
    x[:, [2, 6]] = 0.0
    weight[:, 2] = 100.0
    found = _prune(_unit(5, 8, (30, 20), group), weight, _gram(x))
    assert not found[1][:, [2, 6]].any()
    np.testing.assert_allclose(found[1][:, [0, 1, 3, 4, 5, 7]], weight[:, [0, 1, 3, 4, 5, 7]], rtol=1e-6)
    few = _prune(_unit(5, 8, (35,)), weight, _gram(x))[1]
    assert np.count_nonzero(few == 0.0) == 5
    assert set(np.nonzero(few == 0.0)[1]) <= {2, 6}
    np.testing.assert_allclose(few[few != 0.0], weight[few != 0.0], rtol=1e-6)


def test_more_damping_is_reported():
    statistics, heard = Gram(2), []
    statistics.gram_ii = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    SparseGpt(0.01).levels(unit_problem(_unit(2, 2, (2,)), torch.ones(2, 2), statistics, [1]), heard.append)
    assert len(heard) == 3
    assert heard[0].startswith("layers.0.mlp.up_proj: the Hessian is not positive definite with damping 0.01")


def test_each_block_gives_its_share(monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", 4)
    x, weight = _problem(5, 60, 10, 3)
    found = _prune(_unit(3, 10, (17,)), weight, _gram(x))[1]
    assert [int((found[:, block] == 0).sum()) for block in (slice(4), slice(4, 8), slice(8, 10))] == [5, 5, 3]
