"""The field's allocation rules: closed formulas from signals of the dense model to an allocation at the budget.

Each rule gives a curve of sparsities, and :mod:`~allocator.searchers.rules.apportion` takes its member at the budget.
So rules are normalised to the budget and weighted by the parameters of units here, even if their published form is not.
A rule for blocks gives every unit of a block the block's sparsity. In formulas, S is the target and s a sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from allocator.core.budget import Budget, fits
from allocator.core.signals import Signal, Signals
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.rules import baselines
from allocator.searchers.rules.apportion import apportion, refill

_FLOOR = 0.05
"""Share of every matrix that global thresholds keep, so that no layer collapses."""


def uniform(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Give every unit S. See :func:`allocator.searchers.rules.baselines.uniform`."""
    return baselines.uniform(space, budget)


def erk(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep of a matrix a fraction in proportion to (rows + columns) / (rows · columns).

    Erdős–Rényi-Kernel (Mocanu et al., 2018; Evci et al., "Rigging the Lottery", ICML 2020), for linear layers. Where
    the fraction exceeds 1 the matrix stays dense and the rest is solved again, as in the source.
    """
    rows, columns = signals["dims"].T
    density = (rows + columns) / (rows * columns)
    return apportion(space, budget, lambda x: 1.0 + x * density, -1.0 / float(density.min()), 0.0)


def global_magnitude(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove the weights of smallest magnitude of the whole model, by one threshold on |w|.

    The oldest rule (Han et al., NeurIPS 2015). In contrast to the source, a matrix keeps at least a twentieth.
    """
    return _apply_threshold(space, budget, signals["magnitude"])


def lamp(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove the weights of smallest LAMP score, by one threshold: w_u² / Σ_{v ≥ u} w_v² within the matrix.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, eq. 3. The score by itself keeps
    the largest weight of every matrix; here the floor of :func:`global_magnitude` holds too.
    """
    return _apply_threshold(space, budget, signals["lamp"])


def owl(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep more of blocks with more outliers: kept = 2λ·(D - min D) / (max D - min D) + constant, λ = 0.08.

    D is the share of a block's Wanda scores above M = 5 times their mean (Yin et al., "Outlier weighed layerwise
    sparsity", ICML 2024). The source makes the plain mean over blocks 1 - S; here the constant meets the budget.
    """
    return _shift_to_budget(space, budget, -2 * 0.08 * _scale_to_unit(signals["outliers"]))


def dlp(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep more of blocks with a larger r = 1 - m / Σm, rescaled as in :func:`owl` with α = 0.15.

    m is the median of a block's Wanda scores. The source (Chen et al., "DLP: dynamic layerwise pruning", ICML 2025)
    takes a high median for redundancy, so blocks of large scores lose more. Its code also has a path with the mean. The
    source normalises by the plain mean over blocks.
    """
    median = signals["median"]
    return _shift_to_budget(
        space, budget, -2 * 0.15 * _scale_to_unit(-median / max(float(median.sum()), np.finfo(float).tiny))
    )


def alpha_pruning(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove more of blocks with lighter tails: s = η·[(α - min α) / (max α - min α)·2ε + 1 - ε], ε = 0.3.

    α is the Hill exponent of a matrix's eigenvalues, averaged over a block (Lu et al., "AlphaPruning", NeurIPS 2024,
    eq. 3; the source's assignment by block). As in the source, η meets the budget. Clamped units are compensated here.
    """
    shape = _scale_to_unit(signals["hill"]) * 2 * 0.3 + 1.0 - 0.3
    return apportion(space, budget, lambda x: x * _spread_to_units(space, shape), 0.0, 1.0 / float(shape.min()))


def flap(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove the items of smallest fluctuation of the whole model, by one threshold.

    The fluctuation of a channel is Var(X_j)·‖W_:j‖², standardised within its layer, and that of a head or KV group the
    mean over its channels (An et al., "FLAP", AAAI 2024, WIFV with AL-AM). The rule only decides how many items a unit
    loses. The local pruner chooses which, and with ``pruner.bias`` a run restores their mean output as the source does.
    """
    scores = signals["fluctuation"]
    counts = np.isfinite(scores).sum(axis=1)

    def curve(threshold: float) -> np.ndarray:
        return np.asarray((scores <= threshold).sum(axis=1) / counts)  # NaN is at no threshold

    return apportion(space, budget, curve, float(np.nanmin(scores)) - 1.0, float(np.nanmax(scores)))


def cfsp(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep of blocks in proportion to σ(angle), the angle between a block's input and output over π.

    The coarse step of CFSP (Wang et al., "CFSP: coarse-to-fine activation information", COLING 2025), which prunes
    only feed-forward networks; here every unit of the block gets the block's sparsity. The source divides by the mean
    over blocks and multiplies by 1 - S.
    """
    importance = _spread_to_units(space, 1.0 / (1.0 + np.exp(-signals["angle"])))
    return apportion(space, budget, lambda x: 1.0 + x * importance, -1.0 / float(importance.min()), 0.0)


def ecoflap(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep 1 - p of every unit, p = S + 0.1, and share the other parameters out in proportion to importance.

    Importance is the zeroth-order gradient |L(θ + εz) - L(θ - εz)| / 2ε (Sung et al., "ECoFLaP", ICLR 2024). The source
    computes it for blocks; here it is known for each unit. As in the source, a unit that would keep more than all of
    its parameters stays dense, and the rest is shared out again.
    """
    importance = signals["gradient"] / [unit.params[0] or 1 for unit in space.units]
    importance = importance / max(float(importance.max()), np.finfo(float).tiny)
    most, rest = min(1.0, target + 0.1), importance[importance > 0]
    low = -1.0 / float(rest.min()) if len(rest) else 0.0
    return apportion(space, budget, lambda x: most + x * importance, low, 0.0)


def shortgpt(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Drop whole blocks until the budget holds, in the order of their influence 1 - cos(input, output), least first.

    Men et al., "ShortGPT", 2024. The source removes a number of blocks. Here the budget is exact, so the last dropped
    block takes back what the budget leaves. A dropped unit is at its last level.
    """
    levels, last, influence = list(space.dense), -1, signals["influence"]
    for block in sorted({unit.block for unit in space.units}, key=lambda block: (influence[block], block)):
        if fits(space, levels, budget):
            break
        last = block
        levels = [u.num_levels - 1 if u.block == block else lv for u, lv in zip(space.units, levels, strict=True)]
    inside = [index for index, unit in enumerate(space.units) if unit.block == last]
    return refill(space, levels, budget, inside)


EVERY = ("structured", "unstructured", "n:m")
WEIGHTS = ("unstructured", "n:m")
ITEMS = ("structured",)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the field.

    Attributes:
        allocate: Function of space, budget, target and signals that returns an allocation which fills the budget.
        patterns: Patterns that it serves.
        needs: Signals that it reads.
    """

    allocate: Callable[[SearchSpace, Budget, float, Signals], Allocation]
    patterns: tuple[str, ...]
    needs: tuple[Signal, ...] = ()


RULES: Mapping[str, Rule] = {
    "uniform": Rule(uniform, EVERY),
    "erk": Rule(erk, WEIGHTS, ("dims",)),
    "magnitude": Rule(global_magnitude, WEIGHTS, ("magnitude",)),
    "lamp": Rule(lamp, WEIGHTS, ("lamp",)),
    "owl": Rule(owl, EVERY, ("outliers",)),
    "alphapruning": Rule(alpha_pruning, EVERY, ("hill",)),
    "dlp": Rule(dlp, EVERY, ("median",)),
    "flap": Rule(flap, ITEMS, ("fluctuation",)),
    "cfsp": Rule(cfsp, EVERY, ("angle",)),
    "ecoflap": Rule(ecoflap, EVERY, ("gradient",)),
    "shortgpt": Rule(shortgpt, ITEMS, ("influence",)),
}
"""Rules that need only signals, by name."""


def _spread_to_units(space: SearchSpace, of_block: np.ndarray) -> np.ndarray:
    """Return a number for each unit from one for each block."""
    return np.asarray(of_block[[unit.block for unit in space.units]])


def _scale_to_unit(values: np.ndarray) -> np.ndarray:
    """Return values scaled to [0, 1]; zeros where all are equal."""
    low, high = values.min(), values.max()
    return np.zeros_like(values, dtype=float) if low == high else (values - low) / (high - low)


def _shift_to_budget(space: SearchSpace, budget: Budget, of_block: np.ndarray) -> Allocation:
    """Return the allocation of a sparsity for each block, plus a constant."""
    base = _spread_to_units(space, of_block)
    return apportion(space, budget, lambda x: x + base, -float(base.max()), 1.0 - float(base.min()))


def _apply_threshold(space: SearchSpace, budget: Budget, quantiles: np.ndarray) -> Allocation:
    """Return the allocation of one threshold for all units, from quantiles [units, Q + 1] of their scores."""
    shares = np.linspace(0.0, 1.0, quantiles.shape[1])

    def curve(threshold: float) -> np.ndarray:
        return np.array([min(np.interp(threshold, row, shares), 1.0 - _FLOOR) for row in quantiles])

    return apportion(space, budget, curve, float(quantiles.min()), float(quantiles.max()))
