import itertools

import numpy as np
import pytest
import torch

from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import Norms, Nothing
from allocator.pruning.levels.compact import NEVER
from allocator.pruning.pruners.magnitude_wanda import Magnitude, Wanda
from allocator.testing.problems import unit_problem

ROWS, COLUMNS = 6, 10
KEPT = tuple(ROWS * count for count in (10, 8, 7, 3, 0))
UNIT = Unit(
    name="q_proj", kind="matrix", part="attention", block=0, total=ROWS * COLUMNS, kept=KEPT, params=KEPT, macs=KEPT
)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, COLUMNS)), rng.normal(size=(50, COLUMNS)) * rng.uniform(0.1, 5, size=COLUMNS)


def _levels(pruner, weight, x=None, unit=UNIT):
    statistics = Nothing(COLUMNS)
    if x is not None:
        statistics = Norms(COLUMNS)
        for batch in torch.from_numpy(x).float().split(16):
            statistics.add(batch)
    return pruner.levels(unit_problem(unit, torch.from_numpy(weight).float(), statistics))["removed_at"]


def test_magnitude_removes_the_smallest_of_the_matrix(problem):
    weight, _ = problem
    removed_at = _levels(Magnitude(), weight).numpy()
    for level in range(5):
        expected = np.ones_like(weight, dtype=bool)
        for flat in sorted(range(weight.size), key=lambda i: abs(weight.flat[i]))[: weight.size - KEPT[level]]:
            expected.flat[flat] = False
        np.testing.assert_array_equal(removed_at > level, expected)


def test_wanda_removes_the_smallest_scores_of_each_row(problem):
    weight, x = problem
    removed_at = _levels(Wanda(), weight, x).numpy()
    for level in range(5):
        expected = np.ones_like(weight, dtype=bool)
        for row in range(ROWS):
            scores = [abs(weight[row, j]) * np.sqrt((x[:, j] ** 2).sum()) for j in range(COLUMNS)]
            for column in np.argsort(scores)[: COLUMNS - KEPT[level] // ROWS]:
                expected[row, column] = False
        np.testing.assert_array_equal(removed_at > level, expected)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize(("group", "counts"), [(2, (1, 0)), (5, (4, 3, 1)), (10, (9, 2))])
def test_the_smallest_of_each_group_are_removed(problem, name, group, counts):
    weight, x = problem
    kept = tuple(ROWS * COLUMNS // group * count for count in (group, *counts))
    unit = Unit(
        name="q_proj",
        kind="matrix",
        part="attention",
        block=0,
        total=ROWS * COLUMNS,
        kept=kept,
        params=kept,
        macs=kept,
        group=group,
    )
    removed_at = _levels(*((Magnitude(), weight) if name == "magnitude" else (Wanda(), weight, x)), unit=unit).numpy()
    scale = [1.0 if name == "magnitude" else np.sqrt((x[:, j] ** 2).sum()) for j in range(COLUMNS)]
    for level, count in enumerate(counts, 1):
        expected = np.ones_like(weight, dtype=bool)
        for row, start in itertools.product(range(ROWS), range(0, COLUMNS, group)):
            columns = sorted(range(start, start + group), key=lambda j, row=row: abs(weight[row, j]) * scale[j])
            expected[row, columns[: group - count]] = False
        np.testing.assert_array_equal(removed_at > level, expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_kept_counts_are_exact_and_levels_are_nested(problem, name, ties):
    weight, x = problem
    if ties:
        weight, x = np.sign(weight), np.ones_like(x)
    removed_at = _levels(Magnitude(), weight) if name == "magnitude" else _levels(Wanda(), weight, x)
    masks = [removed_at > level for level in range(5)]
    assert [int(mask.sum()) for mask in masks] == list(KEPT)
    for denser, sparser in itertools.pairwise(masks):
        assert not (sparser & ~denser).any()
    assert removed_at.dtype == torch.uint8
    if name == "wanda":
        assert all((mask.sum(1) == mask.sum(1)[0]).all() for mask in masks)


def test_weights_that_every_level_keeps_are_marked(problem):
    weight, _ = problem
    kept = (60, 54)
    unit = Unit(name="q_proj", kind="matrix", part="attention", block=0, total=60, kept=kept, params=kept, macs=kept)
    removed_at = Magnitude().levels(unit_problem(unit, torch.from_numpy(weight), Nothing(COLUMNS), [1]))["removed_at"]
    assert sorted(removed_at.unique().tolist()) == [1, NEVER]


def test_dead_inputs_go_first_in_wanda(problem):
    weight, x = problem
    x[:, [3, 8]] = 0.0
    weight[:, 3] = 100.0
    removed_at = _levels(Wanda(), weight, x)
    assert (removed_at[:, [3, 8]] == 1).all()
