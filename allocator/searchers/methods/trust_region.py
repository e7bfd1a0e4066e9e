"""Trust-region knapsack: a model at the operating point, the best of it nearby, and real evaluations to decide.

Each round learns what units lose from where the search is, solves the additive problem exactly within several numbers
of levels of the centre, and races the answers. The best moves the centre if it is better; the radius grows with success
and shrinks without.

A profile at the dense model, an unbounded step, or a layer's own error in its place are all much worse: additivity
holds nearby, and for the end-to-end loss only.

Where the evaluator has gradients, an expansion of the loss tells every level of every unit at once, but for curvatures,
which take a step of each unit on few tokens. A round that gains little has them measured on more.

Without gradients, single steps are measured: few tokens, common random numbers, and in a batch they share all blocks
before the one that differs. Between probes the model interpolates; beyond them it extrapolates with a deviation that
grows, and the knapsack is shown pessimistic losses. While rounds gain much, every round has a whole profile on few
tokens, for what units lose changes as the centre moves. A round that gains little raises the tokens, and then only
those steps are probed on which the decision hangs: uncertain ones whose loss per cost is near the going rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator.core.errors import UserError
from allocator.core.space import Allocation
from allocator.searchers.generator import Script, Steps
from allocator.searchers.methods.race import race
from allocator.searchers.solvers.knapsack import knapsack_nearby
from allocator.searchers.surrogates.memory import Memory

_SURVIVORS = 2
"""Answers of a round that may be measured on all tokens."""


@dataclass(frozen=True, slots=True)
class TrustRegionSettings:
    """Settings of the trust-region knapsack.

    Attributes:
        rounds: Profiles, at most.
        radius: Largest step of a unit, in levels, at the beginning.
        least_gain: Share of the loss that a round must gain for another to follow.
    """

    rounds: int = 12
    radius: int = 8
    least_gain: float = 0.02

    def __post_init__(self) -> None:
        if min(self.rounds, self.radius) < 1:
            raise UserError("search.trust_region: rounds and radius must be at least 1")
        if not 0 <= self.least_gain < 1:
            raise UserError(f"search.trust_region.least_gain: expected a share in [0, 1), found {self.least_gain}")


def trust_region(memory: Memory, settings: TrustRegionSettings) -> Script:
    """Search from the memory's centre. See the module's text."""
    radius, fidelity = settings.radius, 0
    units = len(memory.centre)
    for _ in range(settings.rounds):
        before = memory.loss
        yield from memory.expand(memory.tokens[fidelity])
        if not memory.gradients:
            yield from probe(memory, memory.tokens[fidelity], 2 * units if fidelity == 0 else max(1, units // 2))
        found = _answers(memory, radius)
        yield from race(memory, list(found), _SURVIVORS)
        if memory.advance():
            radius = min(settings.radius, 2 * found.get(memory.centre, radius))
        else:
            radius = max(1, min(radius, max(found.values(), default=1)) // 2)
        if before - memory.loss < settings.least_gain * abs(before):
            fidelity += 1
            if fidelity >= len(memory.tokens) - memory.gradients:  # curvatures are never measured on all tokens
                return "no step of the trust region is better"
    return "all rounds are done"


def probe(memory: Memory, tokens: int, count: int) -> Steps:
    """Measure single steps from the centre, those that matter most; the model sees them."""
    yield from memory.compare(_probes(memory, tokens, count), tokens)


def _answers(memory: Memory, radius: int) -> dict[Allocation, int]:
    """Return new allocations, the best of the model within each radius, with the radius."""
    table_ul = memory.surrogate.cautious()
    found: dict[Allocation, int] = {}
    for each in sorted({radius, *(2**power for power in range(radius.bit_length()))}):
        answer = knapsack_nearby(memory.arrays, table_ul, memory.centre, each)
        if not memory.is_measured_at_all(answer):
            found.setdefault(answer, each)
    return found


def _probes(memory: Memory, tokens: int, count: int) -> list[Allocation]:
    """Return single steps from the centre that matter most and are not known on so many tokens."""
    surrogate, arrays = memory.surrogate, memory.arrays
    deviation_ul = surrogate.deviation()
    steps = []
    for unit, level in enumerate(memory.centre):
        for other in (level - 1, level + 1):
            if not 0 <= other <= arrays.last_u[unit]:
                continue
            step = (*memory.centre[:unit], other, *memory.centre[unit + 1 :])
            if not memory.is_measured(step, tokens):
                loss = float(surrogate.table_ul[unit, other] - surrogate.table_ul[unit, level])
                price = float(arrays.price_ul[unit, level] - arrays.price_ul[unit, other])
                steps.append((step, loss, price, float(deviation_ul[unit, other])))
    rate = float(np.median([loss / price for _, loss, price, _ in steps if price] or [0.0]))

    def worth(step: tuple[Allocation, float, float, float]) -> float:
        _, loss, price, deviation = step
        return deviation * float(np.exp(-(((loss - rate * price) / max(deviation, 1e-300)) ** 2) / 2))

    return [step for step, *_ in sorted(steps, key=worth, reverse=True)[:count]]
