"""Rules that measure the model in several steps, run as searchers.

A procedure is a generator: it yields batches of requests, is sent their outcomes, and returns its allocation. It
depends only on the outcomes, so a replay of them continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from allocator.core.budget import Budget, fits
from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.generator import GeneratorSearcher, Script
from allocator.searchers.rules.apportion import apportion, meet_budget, refill, round_to_levels
from allocator.searchers.rules.baselines import two_rate
from allocator.searchers.rules.one_shot import EVERY, ITEMS
from allocator.searchers.solvers.knapsack import knapsack

Procedure = Generator[list[Request], Sequence[Outcome], Allocation]


@dataclass(frozen=True, slots=True)
class RuleTokens:
    """Tokens of the search split on which a procedure measures.

    Attributes:
        few: For the many measurements that guide the procedure.
        all: For the measurements among which it chooses its answer.
    """

    few: int
    all: int


def sweep_two_rate(space: SearchSpace, budget: Budget, target: float, tokens: RuleTokens) -> Procedure:
    """Measure every two-rate allocation and return the best. See ``baselines.two_rate``."""
    outcomes = yield [Request(allocation, tokens.all) for allocation in two_rate(space, budget)]
    return _best(outcomes).request.allocation


_SLOPES = 8


def atp(space: SearchSpace, budget: Budget, target: float, tokens: RuleTokens) -> Procedure:
    """Let sparsity grow in a straight line over depth: s_i = S - β(L - 1)/2 + iβ, the best of eight slopes β.

    ATP (Huang et al., "Determining layer-wise sparsity for LLMs through a theoretical perspective", ICML 2025). Slopes
    are eighths of the steepest that stays within [0, 1]. The source sweeps on the perplexity of test data, and its line
    meets S as a plain mean over layers; here the search split decides, and the line is shifted to meet the budget.
    """
    depth = np.array([unit.block for unit in space.units], dtype=float)
    depth -= depth.max() / 2
    steepest = min(target, 1.0 - target) / max(float(depth.max()), 0.5)
    candidates: dict[Allocation, None] = {}
    for step in range(1, _SLOPES + 1):
        line = steepest * step / _SLOPES * depth
        candidates[apportion(space, budget, partial(np.add, line), -1.0, 2.0)] = None
    outcomes = yield [Request(allocation, tokens.all) for allocation in candidates]
    return _best(outcomes).request.allocation


def finercut(space: SearchSpace, budget: Budget, target: float, tokens: RuleTokens) -> Procedure:
    """Drop the attention or the feed-forward network whose removal changes the output least, until the budget holds.

    After each removal, all remaining sub-blocks are scored again (Zhang et al., "FinerCut: finer-grained interpretable
    layer pruning", 2024). The change is the run's loss; the source takes distances between logits. The source removes a
    number of sub-blocks; here the last dropped sub-block takes back what the budget leaves. A dropped unit is at its
    last level.
    """
    parts: dict[tuple[int, str], list[int]] = {}
    for index, unit in enumerate(space.units):
        if unit.num_levels > 1:
            parts.setdefault((unit.block, unit.part), []).append(index)
    allocation, last = space.dense, list[int]()
    while not fits(space, allocation, budget):
        candidates = {_drop(space, allocation, inside): key for key, inside in parts.items()}
        outcomes = yield [Request(candidate, tokens.few) for candidate in candidates]
        allocation = _best(outcomes).request.allocation
        last = parts.pop(candidates[allocation])
    return refill(space, allocation, budget, last)


_STEP = 0.05
_AMPLITUDE = 0.03


def adapt_pruner(space: SearchSpace, budget: Budget, target: float, tokens: RuleTokens) -> Procedure:
    """Prune in small steps, each smaller for blocks with more influence in the model as pruned so far.

    s_l ← s_l + Δ - A·Î_l with Δ about 0.05 and A = 0.03; Î is the block's influence, 1 - cosine of its input and
    output, less the mean over blocks and scaled to max |Î| = 1 (Pan et al., "Adapt-Pruner", 2025). After each step the
    sparsities are shifted to the share of the budget that is due; the source does not weigh layers by their sizes. It
    may train between steps, which is not done here.
    """
    steps = max(1, round(target / _STEP))
    whole = {cost: space.cost(space.dense, cost) for cost in budget.limits}
    blocks = np.array([unit.block for unit in space.units])
    sparsities, allocation = np.zeros(len(blocks)), space.dense
    for step in range(1, steps + 1):
        (outcome,) = yield [Request(allocation, tokens.few, probe="influence")]
        influence = np.array([outcome.measured[f"influence.{block}"] for block in range(blocks.max() + 1)])
        centred = influence - influence.mean()
        scale = float(np.abs(centred).max()) or 1.0
        base = sparsities - _AMPLITUDE * centred[blocks] / scale
        due = Budget(**{cost: whole[cost] - (whole[cost] - budget.limits[cost]) * step // steps for cost in whole})
        sparsities = meet_budget(space, due, partial(np.add, base), -1.0, 2.0)
        allocation = round_to_levels(space, due, sparsities)
    return allocation


def rd(space: SearchSpace, budget: Budget, target: float, tokens: RuleTokens) -> Procedure:
    """Minimise Σ δ_u(s_u) within the budget, δ being the distortion with one unit alone pruned, for every level.

    Xu et al., "Efficient joint optimization of layer-adaptive weight pruning", ICCV 2023: distortions of the output are
    assumed to add up. The source takes the squared distance of outputs, and a dynamic program that counts single
    weights. Here the distortion is the run's loss, and the knapsack is exact too.
    """
    single = [
        tuple(level if other == index else 0 for other in range(len(space.units)))
        for index, unit in enumerate(space.units)
        for level in range(1, unit.num_levels)
    ]
    outcomes = yield [Request(allocation, tokens.few) for allocation in [space.dense, *single]]
    losses = {outcome.request.allocation: outcome.loss for outcome in outcomes}
    distortions = iter([losses[allocation] - losses[space.dense] for allocation in single])
    table = [[0.0, *(next(distortions) for _ in range(1, unit.num_levels))] for unit in space.units]
    return knapsack(space, budget, table)


@dataclass(frozen=True, slots=True)
class MeasuredRule:
    """A rule that measures the model in several steps.

    Attributes:
        run: Function of space, budget, target and tokens that returns the procedure.
        patterns: Patterns that it serves.
    """

    run: Callable[[SearchSpace, Budget, float, RuleTokens], Procedure]
    patterns: tuple[str, ...]


MEASURED_RULES: Mapping[str, MeasuredRule] = {
    "two_rate": MeasuredRule(sweep_two_rate, EVERY),
    "atp": MeasuredRule(atp, EVERY),
    "finercut": MeasuredRule(finercut, ITEMS),
    "adapt_pruner": MeasuredRule(adapt_pruner, EVERY),
    "rd": MeasuredRule(rd, EVERY),
}
"""Rules that measure, by name."""


def make_rule_searcher(procedure: Procedure, start: Sequence[Allocation], tokens: RuleTokens) -> GeneratorSearcher:
    """Return a searcher that measures its starts, runs a procedure, and measures the procedure's answer.

    Args:
        procedure: One that has not begun.
        start: Allocations to compare the answer with; may be empty.
        tokens: Those of the procedure.
    """
    losses: dict[Allocation, float] = {}

    def rank() -> list[Allocation]:
        return sorted(losses, key=lambda allocation: (losses[allocation], allocation))

    return GeneratorSearcher(_run(procedure, start, tokens, losses), rank)


def _run(
    procedure: Procedure, start: Sequence[Allocation], tokens: RuleTokens, losses: dict[Allocation, float]
) -> Script:
    if start:
        outcomes = yield [Request(allocation, tokens.all) for allocation in dict.fromkeys(start)]
        losses.update({outcome.request.allocation: outcome.loss for outcome in outcomes})
    answer = yield from procedure
    outcomes = yield [Request(answer, tokens.all)]
    losses.update({outcome.request.allocation: outcome.loss for outcome in outcomes})
    return "the rule has come to its answer"


def _drop(space: SearchSpace, allocation: Allocation, inside: Sequence[int]) -> Allocation:
    levels = list(allocation)
    for index in inside:
        levels[index] = space.units[index].num_levels - 1
    return tuple(levels)


def _best(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=lambda outcome: (outcome.loss, outcome.request.allocation))
