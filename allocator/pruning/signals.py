"""Collecting signals for allocation rules: one pass of calibration text through the dense model, block by block.

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
"""M of OWL: a score above so many times the mean is an outlier."""

_LEAST = 1e-9
"""Of eigenvalues, relative to the largest, and of sums of logarithms: below it is rounding."""


@torch.inference_mode()
def collect(calibration: Calibration, wanted: Collection[Signal]) -> Signals:
    """Return signals of a dense model; see :data:`~allocator.core.signals.Signal`.

    Args:
        calibration: The model, its units, and the text. Its pruner is not asked.
        wanted: Which; ``gradient`` is not among them, see :mod:`allocator.evaluation.zeroth_order`.
    """
    assert "gradient" not in wanted
    walker, units = calibration.walker, {unit.name for unit in calibration.space.units}
    rows: dict[Signal, list[np.ndarray]] = {name: [] for name in wanted}
    hidden = calibration.embedded()
    for index in range(len(walker.blocks)):
        sub_blocks = [sub_block for sub_block in calibration.layout.sub_blocks if sub_block.block == index]
        modules = [module for sub_block in sub_blocks for module in sub_block.modules]
        with walker.loaded(index):
            with collect_statistics(walker.model, modules, "moments") as moments:
                leaving = [walker.run(index, batch) for batch in hidden]
            weights = {module: walker.model.get_parameter(f"{module}.weight").detach().float() for module in modules}
            own = [module for module in modules if module in units]
            ends = [[walker.residual(index, state) for state in states] for states in (hidden, leaving)]
            found = {
                **_of_scores(weights, moments, wanted),
                **_of_residuals(ends[0], ends[1], wanted),
                **_of_spectra(weights, wanted),
                **_of_matrices([weights[module] for module in own], wanted),
            }
            if "fluctuation" in wanted:
                found["fluctuation"] = [_fluctuation(sub_block, weights, moments) for sub_block in sub_blocks]
        for name, values in found.items():
            rows[name] += values
        hidden = leaving
        calibration.progress(index + 1)
        give_back()
    return Signals({name: _stacked(values) for name, values in rows.items()})


def _of_scores(
    weights: Mapping[str, torch.Tensor], moments: Mapping[str, Statistics], wanted: Collection[Signal]
) -> dict[Signal, list[np.ndarray]]:
    """Return what there is to know of a block's Wanda scores, all matrices together."""
    if not {"outliers", "median"} & set(wanted):
        return {}
    scores = torch.cat(
        [(weight.abs() * _moments(moments, name).square_i.sqrt().float()).flatten() for name, weight in weights.items()]
    )
    found: dict[Signal, list[np.ndarray]] = {}
    if "outliers" in wanted:
        found["outliers"] = [_number((scores > _OUTLIER * scores.double().mean()).double().mean())]
    if "median" in wanted:
        found["median"] = [_number(scores.median())]
    return found


def _of_residuals(
    entering: Sequence[torch.Tensor], leaving: Sequence[torch.Tensor], wanted: Collection[Signal]
) -> dict[Signal, list[np.ndarray]]:
    """Return how much a block turns the residual stream."""
    if not {"influence", "angle"} & set(wanted):
        return {}
    cosine_n = torch.cat([cosines(a_btd, b_btd).flatten() for a_btd, b_btd in zip(entering, leaving, strict=True)])
    found: dict[Signal, list[np.ndarray]] = {}
    if "influence" in wanted:
        found["influence"] = [_number(1.0 - cosine_n.mean())]
    if "angle" in wanted:
        found["angle"] = [_number(cosine_n.clamp(-1.0, 1.0).arccos().mean() / torch.pi)]
    return found


def _of_spectra(weights: Mapping[str, torch.Tensor], wanted: Collection[Signal]) -> dict[Signal, list[np.ndarray]]:
    if "hill" not in wanted:
        return {}
    return {"hill": [np.array(np.mean([hill_exponent(weight_oi) for weight_oi in weights.values()]))]}


def _of_matrices(weights: Sequence[torch.Tensor], wanted: Collection[Signal]) -> dict[Signal, list[np.ndarray]]:
    """Return what there is to know of matrices that are units."""
    found: dict[Signal, list[np.ndarray]] = {}
    if "dims" in wanted:
        found["dims"] = [np.array(weight_oi.shape) for weight_oi in weights]
    if not {"magnitude", "lamp"} & set(wanted):
        return found
    for weight_oi in weights:
        ordered = weight_oi.abs().flatten().sort().values
        ranks = torch.linspace(0, len(ordered) - 1, QUANTILES + 1, dtype=torch.float64).round().long()
        square = ordered.double().square()
        above = square.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.float64).tiny)
        scores: dict[Signal, torch.Tensor] = {"magnitude": ordered[ranks], "lamp": (square / above)[ranks]}
        for name in scores.keys() & set(wanted):
            found.setdefault(name, []).append(scores[name].cpu().double().numpy())
    return found


def cosines(entering_btd: torch.Tensor, leaving_btd: torch.Tensor) -> torch.Tensor:
    """Return the cosine, [B, T], of the hidden states at a block's two ends, in float64."""
    return functional.cosine_similarity(entering_btd.double(), leaving_btd.double(), dim=-1)


def hill_exponent(weight_oi: torch.Tensor) -> float:
    """Return the Hill exponent of the tail of the eigenvalues of WᵀW: 1 + k / Σ_{i ≤ k} ln(λ_{n-i+1} / λ_{n-k}).

    The tail is the upper half, k = n / 2, as in AlphaPruning (Lu et al., NeurIPS 2024, eq. 2). Small: a heavy tail.
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
    outputs = [expert[-1] for expert in sub_block.experts] or [sub_block.output]
    score_i = torch.cat([_moments(moments, m).variance_i * weights[m].double().square().sum(0) for m in outputs])
    spread = score_i.std() if len(score_i) > 1 else torch.zeros(())
    standard_i = (score_i - score_i.mean()) / (spread if spread > 0 else 1.0)
    return np.asarray(standard_i.view(sub_block.total, -1).mean(1).cpu().numpy())


def _moments(moments: Mapping[str, Statistics], module: str) -> Moments:
    own = moments[module]
    assert isinstance(own, Moments)
    return own


def _number(value: torch.Tensor) -> np.ndarray:
    return np.array(float(value))


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays of one dimension or none as one array, shorter ones filled up with NaN."""
    longest = max((row.size for row in rows), default=0)
    if all(row.size == longest for row in rows):
        return np.stack(rows)
    return np.stack([np.pad(row, (0, longest - row.size), constant_values=np.nan) for row in rows])
