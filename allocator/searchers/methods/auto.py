"""The searches that learn a model of the loss, alone and together: ``auto``, ``trust_region`` and ``guided``.

If the evaluator has gradients, one expansion of the loss and one step of every unit tell nearly all that a large move
needs to know. The first round of the trust region then does most of the work. Guided evolution does the rest, and
expands the loss as it moves. Without gradients, the profile at the operating point does most of the work where units
are many. The races of guided evolution then find how units affect each other, which no profile shows. All of them feed
one model and one memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from allocator.core.protocols import Searcher
from allocator.searchers.generator import GeneratorSearcher, Script
from allocator.searchers.methods.guided import GuidedSettings, guided
from allocator.searchers.methods.trust_region import TrustRegionSettings, probe, trust_region
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.surrogates.memory import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBasedMethod(MethodSettings):
    """What the three methods share.

    Attributes:
        tokens: Fidelities, increasing. The first is for profiles.
    """

    tokens: tuple[int, ...] = (512, 2048, 8192)

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the measurements."""
        return self.tokens

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher, which begins at the best start."""
        memory = Memory(problem.space, problem.budget, problem.start, self.tokens)
        return GeneratorSearcher(self._run(problem, memory), memory.rank)

    def _run(self, problem: SearchProblem, memory: Memory) -> Script:
        yield from memory.begin(problem.start)
        yield from memory.expand()
        return (yield from self._search(problem, memory))

    def _search(self, problem: SearchProblem, memory: Memory) -> Script:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegionMethod(ModelBasedMethod):
    """The trust-region knapsack alone."""

    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)

    def _search(self, problem: SearchProblem, memory: Memory) -> Script:
        return (yield from trust_region(memory, self.trust_region))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedMethod(ModelBasedMethod):
    """Guided evolution alone. Without gradients, it begins with a profile."""

    guided: GuidedSettings = field(default_factory=GuidedSettings)

    def _search(self, problem: SearchProblem, memory: Memory) -> Script:
        if not memory.gradients:
            yield from probe(memory, memory.tokens[0], 2 * len(memory.centre))
        return (yield from guided(memory, self.guided, problem.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoMethod(ModelBasedMethod):
    """The trust-region knapsack, then guided evolution.

    If another round follows, the search ends after the trust region, which is enough to find where finer ladders
    belong.
    """

    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)
    guided: GuidedSettings = field(default_factory=GuidedSettings)

    def _search(self, problem: SearchProblem, memory: Memory) -> Script:
        near = replace(self.trust_region, rounds=1) if memory.gradients else self.trust_region
        ended = yield from trust_region(memory, near)
        if not problem.is_last_round:
            return ended
        return (yield from guided(memory, self.guided, problem.seed))
