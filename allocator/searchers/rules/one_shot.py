"""The field's allocation rules: closed formulas from signals of the dense model to an allocation at the budget.

Each rule gives a curve of sparsities, and :mod:`~allocator.searchers.rules.apportion` takes its member at the budget; a
rule whose published form is not normalised to the budget, or not weighted by the parameters of units, is so here. A
rule that knows blocks gives every unit of a block the block's sparsity. In the formulas S is the target, s a sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from allocator.core.budget import Budget, fits
from allocator.core.signals import Signal, Signals
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.rules import baselines
from allocator.searchers.rules.apportion import apportioned, refilled

_FLOOR = 0.05
"""Share of every matrix that global thresholds leave, against the collapse of a layer."""


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
    return apportioned(space, budget, lambda x: 1.0 + x * density, -1.0 / float(density.min()), 0.0)


def global_magnitude(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove the weights of smallest magnitude of the whole model, by one threshold on |w|.

    The oldest rule (Han et al., NeurIPS 2015). Departs from it in a floor: a matrix keeps a twentieth at least.
    """
    return _threshold(space, budget, signals["magnitude"])


def lamp(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove the weights of smallest LAMP score, by one threshold: w_u² / Σ_{v ≥ u} w_v² within the matrix.

    Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, eq. 3. The score by itself keeps
    the largest weight of every matrix; the floor of :func:`global_magnitude` is kept here too.
    """
    return _threshold(space, budget, signals["lamp"])


def owl(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep more of blocks with more outliers: kept = 2λ·(D - min D) / (max D - min D) + constant, λ = 0.08.

    D is the share of a block's Wanda scores above M = 5 times their mean (Yin et al., "Outlier weighed layerwise
    sparsity", ICML 2024). The source makes the plain mean over blocks 1 - S; here the constant meets the budget.
    """
    return _shifted(space, budget, -2 * 0.08 * _unit_range(signals["outliers"]))


def dlp(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep more of blocks with a larger r = 1 - m / Σm, rescaled as in :func:`owl` with α = 0.15.

    m is the median of a block's Wanda scores: to the source (Chen et al., "DLP: dynamic layerwise pruning", ICML 2025)
    a high one is redundancy, so blocks of large scores lose more. Its code also has a path with the mean; normalised
    there by the plain mean over blocks.
    """
    median = signals["median"]
    return _shifted(space, budget, -2 * 0.15 * _unit_range(-median / max(float(median.sum()), np.finfo(float).tiny)))


def alpha_pruning(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove more of blocks with lighter tails: s = η·[(α - min α) / (max α - min α)·2ε + 1 - ε], ε = 0.3.

    α is the Hill exponent of a matrix's eigenvalues, averaged over a block (Lu et al., "AlphaPruning", NeurIPS 2024,
    eq. 3; the source's assignment by block). η meets the budget, as in the source, but for what clamping leaves over.
    """
    shape = _unit_range(signals["hill"]) * 2 * 0.3 + 1.0 - 0.3
    return apportioned(space, budget, lambda x: x * _by_unit(space, shape), 0.0, 1.0 / float(shape.min()))


def flap(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Remove the items of smallest fluctuation of the whole model, by one threshold.

    The fluctuation of a channel is Var(X_j)·‖W_:j‖², standardised within its layer, and that of a head or KV group the
    mean over its channels (An et al., "FLAP", AAAI 2024, WIFV with AL-AM). Only how many items a unit loses is taken
    from it; the local pruner chooses which, and a run with ``pruner.bias`` gives their mean output back as the source.
    """
    scores = signals["fluctuation"]
    counts = np.isfinite(scores).sum(axis=1)

    def curve(threshold: float) -> np.ndarray:
        return np.asarray((scores <= threshold).sum(axis=1) / counts)  # NaN is at no threshold

    return apportioned(space, budget, curve, float(np.nanmin(scores)) - 1.0, float(np.nanmax(scores)))


def cfsp(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep of blocks in proportion to σ(angle), the angle being that between a block's input and output over π.

    The coarse step of CFSP (Wang et al., "CFSP: coarse-to-fine activation information", COLING 2025), which prunes
    feed-forward networks alone; here every unit of the block gets the block's sparsity. The source divides by the mean
    over blocks and multiplies by 1 - S.
    """
    importance = _by_unit(space, 1.0 / (1.0 + np.exp(-signals["angle"])))
    return apportioned(space, budget, lambda x: 1.0 + x * importance, -1.0 / float(importance.min()), 0.0)


def ecoflap(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Keep 1 - p of every unit, p = S + 0.1, and share the other parameters out in proportion to importance.

    Importance is the zeroth-order gradient |L(θ + εz) - L(θ - εz)| / 2ε (Sung et al., "ECoFLaP", ICLR 2024). The source
    gives it to blocks; here it is known for each unit. A unit that would have more than all stays dense, and the rest
    is shared out again, as in the source.
    """
    importance = signals["gradient"] / [unit.params[0] or 1 for unit in space.units]
    importance = importance / max(float(importance.max()), np.finfo(float).tiny)
    most, rest = min(1.0, target + 0.1), importance[importance > 0]
    low = -1.0 / float(rest.min()) if len(rest) else 0.0
    return apportioned(space, budget, lambda x: most + x * importance, low, 0.0)


def shortgpt(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> Allocation:
    """Drop whole blocks, those of least influence 1 - cos(input, output) first, until the budget holds.

    Men et al., "ShortGPT", 2024. The source removes a number of blocks; here the last one dropped takes back what the
    budget leaves, for it is exact. To drop a unit is to put it at its last level.
    """
    levels, last, influence = list(space.dense), -1, signals["influence"]
    for block in sorted({unit.block for unit in space.units}, key=lambda block: (influence[block], block)):
        if fits(space, levels, budget):
            break
        last = block
        levels = [u.num_levels - 1 if u.block == block else lv for u, lv in zip(space.units, levels, strict=True)]
    inside = [index for index, unit in enumerate(space.units) if unit.block == last]
    return refilled(space, levels, budget, inside)


EVERY = ("structured", "unstructured", "n:m")
WEIGHTS = ("unstructured", "n:m")
ITEMS = ("structured",)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the field.

    Attributes:
        allocate: From space, budget, target and signals to an allocation within the budget, and with it full.
        patterns: Those that it serves.
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
"""By name: rules that need nothing but signals."""


def portfolio(space: SearchSpace, budget: Budget, target: float, signals: Signals) -> dict[str, Allocation]:
    """Return the distinct allocations of all rules that serve the space and whose signals are there, by rule.

    They cost no measurement, and are worth a look on a few tokens before a search begins.
    """
    found: dict[str, Allocation] = {}
    for name, rule in RULES.items():
        if space.pattern in rule.patterns and not signals.missing(rule.needs):
            allocation = rule.allocate(space, budget, target, signals)
            if allocation not in found.values():
                found[name] = allocation
    return found


def _by_unit(space: SearchSpace, of_block: np.ndarray) -> np.ndarray:
    """Return a number for each unit from one for each block."""
    return np.asarray(of_block[[unit.block for unit in space.units]])


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Return values scaled to [0, 1]; zeros where all are equal."""
    low, high = values.min(), values.max()
    return np.zeros_like(values, dtype=float) if low == high else (values - low) / (high - low)


def _shifted(space: SearchSpace, budget: Budget, of_block: np.ndarray) -> Allocation:
    """Return the allocation of a sparsity for each block, plus a constant."""
    base = _by_unit(space, of_block)
    return apportioned(space, budget, lambda x: x + base, -float(base.max()), 1.0 - float(base.min()))


def _threshold(space: SearchSpace, budget: Budget, quantiles: np.ndarray) -> Allocation:
    """Return the allocation of one threshold for all units, from quantiles [units, Q + 1] of their scores."""
    shares = np.linspace(0.0, 1.0, quantiles.shape[1])

    def curve(threshold: float) -> np.ndarray:
        return np.array([min(np.interp(threshold, row, shares), 1.0 - _FLOOR) for row in quantiles])

    return apportioned(space, budget, curve, float(quantiles.min()), float(quantiles.max()))
