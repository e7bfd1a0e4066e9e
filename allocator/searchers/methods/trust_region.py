"""Trust-region knapsack: a model at the operating point, the best of it nearby, and real evaluations to decide.

Each round learns what a step of each unit loses at the centre, solves the additive problem exactly within several radii
around the centre, and races the answers. The best answer becomes the centre if it is better. The radius grows after
success and shrinks after failure.

A profile at the dense model, an unbounded step, or a layer's own error in place of the loss are all much worse, because
additivity holds only nearby and only for the end-to-end loss.

If the evaluator has gradients, an expansion of the loss tells the slope of every level of every unit at once. Each
curvature takes a step of its unit on few tokens. After a round that gains little, they are measured on more tokens.

Without gradients, single steps are measured: on few tokens, with common random numbers, and in one batch, where they
share all blocks before the one that differs. The model interpolates between probes. Beyond them it extrapolates with a
growing deviation, and the knapsack gets pessimistic losses. While rounds gain much, every round has a whole profile on
few tokens, because losses change as the centre moves. After a round that gains little, the tokens are raised and only
the decisive steps are probed: uncertain ones whose loss per cost is near the median.
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
"""Most answers of a round that are measured on all tokens."""


@dataclass(frozen=True, slots=True)
class TrustRegionSettings:
    """Settings of the trust-region knapsack.

    Attributes:
        rounds: Most rounds, each with a profile.
        radius: Largest step of a unit at the beginning, in levels.
        least_gain: Share of the loss that a round must gain; after a smaller gain, the tokens are raised.
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
    """Search from the memory's centre, and return why the search ended. See the module's text."""
    radius, fidelity = settings.radius, 0
    units = len(memory.centre)
    for _ in range(settings.rounds):
        before = memory.loss
        yield from memory.expand(memory.tokens[fidelity])
        if not memory.gradients:
            yield from probe(memory, memory.tokens[fidelity], 2 * units if fidelity == 0 else max(1, units // 2))
        answers = _find_answers(memory, radius)
        yield from race(memory, list(answers), _SURVIVORS)
        if memory.advance():
            radius = min(settings.radius, 2 * answers.get(memory.centre, radius))
        else:
            radius = max(1, min(radius, max(answers.values(), default=1)) // 2)
        if before - memory.loss < settings.least_gain * abs(before):
            fidelity += 1
            if fidelity >= len(memory.tokens) - memory.gradients:  # curvatures are never measured on all tokens
                return "no step of the trust region is better"
    return "all rounds are done"


def probe(memory: Memory, tokens: int, count: int) -> Steps:
    """Measure the single steps from the centre that matter most, and show them to the model."""
    yield from memory.compare(_choose_probes(memory, tokens, count), tokens)


def _find_answers(memory: Memory, radius: int) -> dict[Allocation, int]:
    """Return the model's best allocations within each radius that were not measured yet, with their radius."""
    table_ul = memory.surrogate.cautious()
    radii: dict[Allocation, int] = {}
    for within in sorted({radius, *(2**power for power in range(radius.bit_length()))}):
        answer = knapsack_nearby(memory.arrays, table_ul, memory.centre, within)
        if not memory.is_measured_at_all(answer):
            radii.setdefault(answer, within)
    return radii


def _choose_probes(memory: Memory, tokens: int, count: int) -> list[Allocation]:
    """Return the single steps from the centre that matter most and were not measured on so many tokens."""
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
