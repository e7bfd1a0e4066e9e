"""The size of the loss's gradient in the weights of each unit, without a backward pass."""

from __future__ import annotations

import numpy as np
import torch

from allocator.core.notify import Progress
from allocator.core.signals import Signals
from allocator.core.space import Unit
from allocator.evaluation.loss import divergence
from allocator.evaluation.spec import EngineSpec, check_device
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.model.live.walk import SEQUENCES_PER_BATCH, BlockWalker

_STEP = 1e-3
"""ε, the size of the change of a weight."""

_DIRECTIONS = 4
"""Number of random directions for each unit; their results are averaged."""


@torch.inference_mode()
def zeroth_order(spec: EngineSpec, examples: Examples, progress: Progress = lambda done: None) -> Signals:
    """Return ``gradient``: |L(θ + εz) - L(θ - εz)| / 2ε for each unit, z normal in the unit's weights and 0 elsewhere.

    ECoFLaP (Sung et al., ICLR 2024, after MeZO): L is the negative log-likelihood in nats per token, ε = 1e-3. The
    source draws a direction for every sample of a group of samples. Here every unit gets four directions on the first
    batch of sequences, the same ones in every run. The model is always in float32, because ε is below the resolution
    of bfloat16. The units of one block share the blocks before it, so that each direction costs half a forward pass
    for each sign, on average.

    Args:
        spec: The model and its units.
        examples: Calibration text.
        progress: Called with the number of blocks that are done.
    """
    assert spec.layout.kind.generates, "causal language models alone"
    check_device(spec.device)
    torch.set_num_threads(spec.threads)
    walker = BlockWalker(load_model(spec.checkpoint, torch.float32).to(spec.device), spec.layout)
    batch = examples[:SEQUENCES_PER_BATCH].to_tensors().to(spec.device)
    tokens_bt = batch.inputs["input_ids"]
    hidden_btd = walker.embed(batch)
    sizes = np.zeros(len(spec.space.units))
    for block in range(len(walker.blocks)):
        for index, unit in enumerate(spec.space.units):
            if unit.block == block:
                slopes = [_slope(walker, spec, unit, tokens_bt, hidden_btd, (index, d)) for d in range(_DIRECTIONS)]
                sizes[index] = np.mean(slopes)
        hidden_btd = walker.run(block, hidden_btd)
        progress(block + 1)
    return Signals({"gradient": sizes})


def _slope(
    walker: BlockWalker,
    spec: EngineSpec,
    unit: Unit,
    tokens_bt: torch.Tensor,
    hidden_btd: torch.Tensor,
    seed: tuple[int, int],
) -> float:
    """Return the absolute slope of the loss along one direction, from the hidden states that enter the unit's block."""
    modules: tuple[str, ...] = (unit.name,)
    if unit.kind != "matrix":
        modules = next(sub_block.modules for sub_block in spec.layout.sub_blocks if sub_block.name == unit.name)
    weights = [walker.model.get_parameter(f"{module}.weight") for module in modules]
    generator = torch.Generator().manual_seed(seed[0] * _DIRECTIONS + seed[1])
    directions = [torch.randn(weight.shape, generator=generator).to(weight.device) for weight in weights]
    before = [weight.clone() for weight in weights]
    losses = []
    for step in (_STEP, -_STEP):
        for weight, dense, direction in zip(weights, before, directions, strict=True):
            weight.copy_(dense + step * direction)
        leaving_btd = hidden_btd
        for index in range(unit.block, len(walker.blocks)):
            leaving_btd = walker.run(index, leaving_btd)
        _, nll_b = divergence(None, leaving_btd, walker.logits, tokens_bt)
        losses.append(float(nll_b.sum()) / tokens_bt[:, 1:].numel())
    for weight, dense in zip(weights, before, strict=True):
        weight.copy_(dense)
    return abs(losses[0] - losses[1]) / (2 * _STEP)
