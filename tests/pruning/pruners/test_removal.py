import numpy as np
import pytest
import torch
from forked import Python

from allocator.pruning.pruners.removal import obs_order

DEADLINE_S = 120.0


def _problem(seed, inputs, outputs):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * inputs, inputs)) @ (rng.normal(size=(inputs, inputs)) * rng.uniform(0.2, 2.0, size=inputs))
    gram = x.T @ x
    return rng.normal(size=(outputs, inputs)), gram + 0.01 * np.mean(np.diag(gram)) * np.eye(inputs)


def _plain_order(weight, gram, width, num_groups=1):
    """One removal at a time on full matrices, as the formula says."""
    weight, inverse = weight.copy(), np.linalg.inv(gram)
    items = weight.shape[1] // width
    per_group = items // num_groups
    removed, lost = [[] for _ in range(num_groups)], set()
    for _ in range(items):
        scores = {}
        for item in range(items):
            if item // per_group in lost or item in removed[item // per_group]:
                continue
            own = slice(item * width, (item + 1) * width)
            scores[item] = np.trace(weight[:, own] @ np.linalg.inv(inverse[own, own]) @ weight[:, own].T)
        item = min(scores, key=scores.get)
        own = slice(item * width, (item + 1) * width)
        spread = np.linalg.inv(inverse[own, own]) @ inverse[own]
        weight, inverse = weight - weight[:, own] @ spread, inverse - inverse[:, own] @ spread
        removed[item // per_group].append(item)
        lost = (lost | {item // per_group}) if len(lost) + 1 < num_groups else set()
    return [item for group in removed for item in reversed(group)]


@pytest.fixture(scope="module")
def channels():
    weight, gram = _problem(0, 200, 60)
    return weight, gram, _plain_order(weight, gram, 1)


@pytest.mark.parametrize("batch", [None, 1, 2, 7, 64, 199, 200, 500])
def test_channels_go_in_the_order_of_the_plain_pass_whatever_the_batch(channels, batch):
    weight, gram, expected = channels
    inverse = torch.from_numpy(np.linalg.inv(gram))
    assert obs_order(torch.from_numpy(weight), inverse, 1, batch=batch).tolist() == expected


@pytest.mark.parametrize("batch", [None, 1, 3, 5])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("width", [1, 4])
def test_items_in_groups_go_in_the_order_of_the_plain_pass(width, num_groups, batch):
    for seed in range(3):
        weight, gram = _problem(seed, 12 * width, 9)
        inverse = torch.from_numpy(np.linalg.inv(gram))
        found = obs_order(torch.from_numpy(weight), inverse, width, num_groups, batch).tolist()
        assert found == _plain_order(weight, gram, width, num_groups)
        for group, part in enumerate(np.split(np.array(found), num_groups)):
            assert sorted(part) == list(range(12 // num_groups * group, 12 // num_groups * (group + 1)))


def test_wide_items_are_ordered_on_several_threads(tmp_path):
    """PyTorch's LU of a batch of matrices over some 150 rows hangs or fails on more than one thread."""
    code = """
import torch
from allocator.pruning.pruners.removal import obs_order
weight = torch.randn(64, 480, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
inverse = torch.linalg.cholesky(weight.T @ weight + torch.eye(480)).cholesky_inverse()
orders = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    orders.append(obs_order(weight, inverse, 160).tolist())
assert orders[0] == orders[1], orders
"""
    process = Python(["-c", code], tmp_path)
    try:
        _, error = process.communicate(DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, error


def test_inputs_are_left_as_they_were():
    weight, gram = (torch.from_numpy(x) for x in _problem(1, 8, 3))
    before = weight.clone(), gram.clone()
    obs_order(weight, gram, 2, 2)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_a_round_takes_one_item_of_every_group_even_if_others_cost_less():
    """Group 0 holds the four cheapest items; still every second removal is from group 1."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 13.0, 12.0, 11.0, 10.0]], dtype=torch.float64)
    order = obs_order(weight, torch.eye(8, dtype=torch.float64), 1, 2)
    assert order.tolist() == [3, 2, 1, 0, 4, 5, 6, 7]
