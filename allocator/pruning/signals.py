"""Signals for allocation rules, from one pass of calibration text through the dense model, block by block.

Shapes: B sequences, T tokens, D hidden size; o output and i input features of one matrix; m items of w columns each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional

from allocator.core.signals import QUANTILES, Signal, Signals
from allocator.model.family.sub_blocks import SubBlock
from allocator.model.live.memory import give_back
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.calibration.statistics import Moments, Statistics, collect_statistics

_OUTLIER = 5.0
"""M of OWL: a score above this multiple of the mean is an outlier."""

_LEAST = 1e-9
"""Rounding error of eigenvalues, relative to the largest, and of sums of logarithms; a lower bound on both."""


@torch.inference_mode()
def collect(calibration: Calibration, wanted: Collection[Signal]) -> Signals:
    """Return signals of a dense model; see :data:`~allocator.core.signals.Signal`.

    Args:
        calibration: The model, its units, and the text. Its pruner is not used.
        wanted: The signals to collect, without ``gradient``, which :mod:`allocator.evaluation.zeroth_order` measures.
    """
    assert "gradient" not in wanted
    walker, units = calibration.walker, {unit.name for unit in calibration.space.units}
    rows: dict[Signal, list[np.ndarray]] = {name: [] for name in wanted}
    hidden = calibration.embed()
    for index in range(len(walker.blocks)):
        sub_blocks = [sub_block for sub_block in calibration.layout.sub_blocks if sub_block.block == index]
        modules = [module for sub_block in sub_blocks for module in sub_block.modules]
        with walker.loaded(index):
            with collect_statistics(walker.model, modules, "moments") as moments:
                leaving = [walker.run(index, batch) for batch in hidden]
            weights = {module: walker.model.get_parameter(f"{module}.weight").detach().float() for module in modules}
            matrices = [weights[module] for module in modules if module in units]
            ends = [[walker.residual(index, state) for state in states] for states in (hidden, leaving)]
            values = {
                **_of_scores(weights, moments, wanted),
                **_of_residuals(ends[0], ends[1], wanted),
                **_of_spectra(weights, wanted),
                **_of_matrices(matrices, wanted),
            }
            if "fluctuation" in wanted:
                values["fluctuation"] = [_fluctuation(sub_block, weights, moments) for sub_block in sub_blocks]
        for name, arrays in values.items():
            rows[name] += arrays
        hidden = leaving
        calibration.progress(index + 1)
        give_back()
    return Signals({name: _stack(arrays) for name, arrays in rows.items()})


def _of_scores(
    weights: Mapping[str, torch.Tensor], moments: Mapping[str, Statistics], wanted: Collection[Signal]
) -> dict[Signal, list[np.ndarray]]:
    """Return the signals of a block's Wanda scores, over all of its matrices."""
    if not {"outliers", "median"} & set(wanted):
        return {}
    scores = torch.cat(
        [(weight.abs() * _moments(moments, name).square_i.sqrt().float()).flatten() for name, weight in weights.items()]
    )
    signals: dict[Signal, list[np.ndarray]] = {}
    if "outliers" in wanted:
        signals["outliers"] = [_number((scores > _OUTLIER * scores.double().mean()).double().mean())]
    if "median" in wanted:
        signals["median"] = [_number(scores.median())]
    return signals


def _of_residuals(
    entering: Sequence[torch.Tensor], leaving: Sequence[torch.Tensor], wanted: Collection[Signal]
) -> dict[Signal, list[np.ndarray]]:
    """Return the signals of the angle between the residual streams that enter and leave a block."""
    if not {"influence", "angle"} & set(wanted):
        return {}
    cosine_n = torch.cat([cosines(a_btd, b_btd).flatten() for a_btd, b_btd in zip(entering, leaving, strict=True)])
    signals: dict[Signal, list[np.ndarray]] = {}
    if "influence" in wanted:
        signals["influence"] = [_number(1.0 - cosine_n.mean())]
    if "angle" in wanted:
        signals["angle"] = [_number(cosine_n.clamp(-1.0, 1.0).arccos().mean() / torch.pi)]
    return signals


def _of_spectra(weights: Mapping[str, torch.Tensor], wanted: Collection[Signal]) -> dict[Signal, list[np.ndarray]]:
    """Return the mean Hill exponent of a block's matrices."""
    if "hill" not in wanted:
        return {}
    return {"hill": [np.array(np.mean([hill_exponent(weight_oi) for weight_oi in weights.values()]))]}


def _of_matrices(weights: Sequence[torch.Tensor], wanted: Collection[Signal]) -> dict[Signal, list[np.ndarray]]:
    """Return the signals of matrices that are units."""
    signals: dict[Signal, list[np.ndarray]] = {}
    if "dims" in wanted:
        signals["dims"] = [np.array(weight_oi.shape) for weight_oi in weights]
    if not {"magnitude", "lamp"} & set(wanted):
        return signals
    for weight_oi in weights:
        ordered = weight_oi.abs().flatten().sort().values
        ranks = torch.linspace(0, len(ordered) - 1, QUANTILES + 1, dtype=torch.float64).round().long()
        square = ordered.double().square()
        above = square.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
        scores: dict[Signal, torch.Tensor] = {"magnitude": ordered[ranks], "lamp": (square / above)[ranks]}
        for name in scores.keys() & set(wanted):
            signals.setdefault(name, []).append(scores[name].cpu().double().numpy())
    return signals


def cosines(entering_btd: torch.Tensor, leaving_btd: torch.Tensor) -> torch.Tensor:
    """Return the cosine, [B, T], of the hidden states at a block's two ends, in float64."""
    return functional.cosine_similarity(entering_btd.double(), leaving_btd.double(), dim=-1)


def hill_exponent(weight_oi: torch.Tensor) -> float:
    """Return the Hill exponent of the tail of the eigenvalues of WᵀW: 1 + k / Σ_{i ≤ k} ln(λ_{n-i+1} / λ_{n-k}).

    The tail is the upper half, k = n / 2, as in AlphaPruning (Lu et al., NeurIPS 2024, eq. 2). A small exponent means a
    heavy tail.
    """
    matrix = weight_oi.double()
    eigenvalues = torch.linalg.eigvalsh(matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix)
    eigenvalues = eigenvalues.clamp_min(max(float(eigenvalues[-1]), _LEAST) * _LEAST)
    k = max(1, len(eigenvalues) // 2)
    logs = (eigenvalues[-k:] / eigenvalues[-k - 1 if len(eigenvalues) > 1 else -1]).log().sum()
    return 1.0 + k / max(float(logs), _LEAST)


def _fluctuation(
    sub_block: SubBlock, weights: Mapping[str, torch.Tensor], moments: Mapping[str, Statistics]
) -> np.ndarray:
    """Return FLAP's standardised fluctuation of every item of a sub-block."""
    outputs = [expert[-1] for expert in sub_block.experts] or [sub_block.output]
    score_i = torch.cat([_moments(moments, m).variance_i * weights[m].double().square().sum(0) for m in outputs])
    spread = score_i.std() if len(score_i) > 1 else torch.zeros(())
    standard_i = (score_i - score_i.mean()) / (spread if spread > 0 else 1.0)
    return np.asarray(standard_i.view(sub_block.total, -1).mean(1).cpu().numpy())


def _moments(moments: Mapping[str, Statistics], module: str) -> Moments:
    statistics = moments[module]
    assert isinstance(statistics, Moments)
    return statistics


def _number(value: torch.Tensor) -> np.ndarray:
    return np.array(float(value))


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays of at most one dimension as one array; shorter ones are filled up with NaN."""
    longest = max((row.size for row in rows), default=0)
    if all(row.size == longest for row in rows):
        return np.stack(rows)
    return np.stack([np.pad(row, (0, longest - row.size), constant_values=np.nan) for row in rows])
