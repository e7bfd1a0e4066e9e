"""A searcher of your own, which needs no change of the package: random exchanges from the best allocation so far."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import allocator
from allocator.core.protocols import Outcome, Request
from allocator.searchers.methods.evolution import exchange
from allocator.searchers.problem import MethodSettings, SearchProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class HillClimbing(MethodSettings):
    """Settings: how often, how many at once, and on how much text."""

    steps: int = 5
    batch: int = 4
    tokens: int = 1024

    @property
    def fidelities(self) -> tuple[int, ...]:
        return (self.tokens,)

    def make(self, problem: SearchProblem) -> "HillClimber":
        return HillClimber(self, problem)


class HillClimber:
    """Asks for neighbours of the best allocation. Its random numbers depend on the seed and the step alone."""

    def __init__(self, settings: HillClimbing, problem: SearchProblem) -> None:
        self.settings, self.problem, self.step = settings, problem, 0
        self.losses: dict[tuple[int, ...], float] = {}

    def ask(self) -> Sequence[Request]:
        space, budget, best = self.problem.space, self.problem.budget, self.finalists()[:1]
        rng = np.random.default_rng([self.problem.seed, self.step])
        near = [exchange(space, best[0], budget, rng, times=2) for _ in range(self.settings.batch)] if best else []
        new = [a for a in dict.fromkeys(near or self.problem.start) if a not in self.losses]
        return [Request(allocation=a, tokens=self.settings.tokens) for a in new if self.step <= self.settings.steps]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        self.losses.update({outcome.request.allocation: outcome.loss for outcome in outcomes})
        self.step += 1

    def ended(self) -> str:
        return "all steps are done"

    def finalists(self) -> Sequence[tuple[int, ...]]:
        return sorted(self.losses, key=lambda allocation: (self.losses[allocation], allocation))


if __name__ == "__main__":
    small = ["tokens.calibration=2048", "tokens.test=512", "tokens.selection=512"]
    result = allocator.search(target=0.5, searcher=HillClimbing(), workers=0, name="own-searcher", settings=small)
    print(result.figures["uniform"]["kl"], result.figures["searched"]["kl"])
