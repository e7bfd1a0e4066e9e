"""The zeroth-order slope against automatic differentiation along the same directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from allocator.evaluation.zeroth_order import zeroth_order

DIRECTIONS = 4


@pytest.fixture(params=["structured", "unstructured"])
def own(request):
    return request.getfixturevalue(request.param)


def test_slopes_are_those_of_automatic_differentiation(own, splits):
    found = zeroth_order(own, splits["calibration"])["gradient"]
    model = AutoModelForCausalLM.from_pretrained(own.checkpoint.folder, dtype=torch.float64)
    tokens = splits["calibration"][:4].to_tensors().inputs["input_ids"]
    model(tokens, labels=tokens).loss.backward()
    modules = {sub_block.name: sub_block.modules for sub_block in own.layout.sub_blocks}
    for index, unit in enumerate(own.space.units):
        slopes = []
        for direction in range(DIRECTIONS):
            generator = torch.Generator().manual_seed(index * DIRECTIONS + direction)
            slope = 0.0
            for module in modules.get(unit.name, (unit.name,)):
                gradient = model.get_parameter(f"{module}.weight").grad
                slope += float((gradient * torch.randn(gradient.shape, generator=generator).double()).sum())
            slopes.append(abs(slope))
        assert found[index] == pytest.approx(np.mean(slopes), rel=0.02, abs=2e-3)


def test_it_is_the_same_every_time_and_tells_how_far_it_is(structured, splits):
    steps = []
    first = zeroth_order(structured, splits["calibration"], steps.append)
    assert steps == [1, 2, 3]
    np.testing.assert_array_equal(first["gradient"], zeroth_order(structured, splits["calibration"])["gradient"])
    assert (first["gradient"] > 0).all()
