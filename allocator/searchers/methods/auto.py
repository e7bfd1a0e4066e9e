"""The searches that learn a model of the loss, put together: what a user should get without knowing any of this.

Where there are gradients, one expansion of the loss and one step of every unit tell nearly all that a large move needs
to know: the first round of the trust region does most of the work, and guided evolution, expanding as it moves, the
rest. Without gradients the profile at the operating point does most of the work where units are many; the races of
guided evolution find what units do to each other, which no profile shows. All feed one model and one memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from allocator.core.budget import Budget
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.methods.guided import GuidedSettings, guided
from allocator.searchers.methods.trust_region import TrustRegionSettings, probe, trust_region
from allocator.searchers.script import Memory, Script, Scripted

ModelBased = Literal["auto", "trust_region", "guided"]


def model_based(
    method: ModelBased,
    space: SearchSpace,
    budget: Budget,
    start: Sequence[Allocation],
    tokens: Sequence[int],
    near: TrustRegionSettings,
    far: GuidedSettings,
    seed: int,
    brief: bool = False,
) -> Scripted:
    """Return the searcher of a name, beginning at the best of ``start``, which are within the budget.

    A ``brief`` search of ``auto`` is done after the trust region: enough to tell where finer ladders belong.
    """
    memory = Memory(space, budget, start, tokens)
    return Scripted(_script(method, memory, start, near, far, seed, brief), memory.ranked)


def _script(
    method: ModelBased,
    memory: Memory,
    start: Sequence[Allocation],
    near: TrustRegionSettings,
    far: GuidedSettings,
    seed: int,
    brief: bool,
) -> Script:
    yield from memory.begin(start)
    yield from memory.expand()
    if method == "trust_region":
        return (yield from trust_region(memory, near))
    if method == "auto":
        ended = yield from trust_region(memory, replace(near, rounds=1) if memory.gradients else near)
        if brief:
            return ended
    elif not memory.gradients:
        yield from probe(memory, memory.tokens[0], 2 * len(memory.centre))
    return (yield from guided(memory, far, seed))
