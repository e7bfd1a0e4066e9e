"""NSGA-II by pymoo: the front of KL against parameters, and from it the plan for one budget.

Deb et al., 2002, as implemented by pymoo and driven through its ask/tell. Genomes are levels; crossover and
mutation are pymoo's simulated binary and polynomial operators, rounded. The front ranges over all sizes, so
the search ends with one more batch: the members nearest the budget, repaired to fill it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair

from allocator.core.budget import Budget, fits, repair
from allocator.core.errors import UserError
from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation, SearchSpace


@dataclass(frozen=True, slots=True)
class Nsga2Settings:
    """Settings of NSGA-II.

    Attributes:
        generations: How often a population is bred.
        population: Members, and offspring per generation.
        tokens: Tokens of every measurement.
    """

    generations: int = 20
    population: int = 24
    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.generations < 1 or self.population < 4 or self.tokens < 1:
            raise UserError("search.nsga2: expected generations >= 1, population >= 4 and tokens >= 1")


class Nsga2:
    """Two objectives, KL and parameters, both minimised."""

    def __init__(
        self, space: SearchSpace, budget: Budget, start: Sequence[Allocation], settings: Nsga2Settings, seed: int
    ) -> None:
        """Begin with ``start``, equal levels at every sparsity, and random levels."""
        self._space, self._budget, self._settings, self._seed = space, budget, settings, seed
        self._cost = next(iter(budget.limits))
        self._generation = 0
        self._scored: dict[Allocation, float] = {}
        self._asked: Population | None = None
        self._done = False
        upper = np.array([unit.num_levels - 1 for unit in space.units])
        problem = Problem(n_var=len(upper), n_obj=2, xl=np.zeros_like(upper), xu=upper, vtype=int)
        self._algorithm = NSGA2(
            pop_size=settings.population,
            sampling=self._initial(upper, start),
            crossover=SBX(vtype=float, repair=RoundingRepair()),
            mutation=PM(vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        self._algorithm.setup(problem, termination=NoTermination(), seed=seed)

    def ask(self) -> Sequence[Request]:
        """Return a generation; after the last one, the members nearest the budget, repaired."""
        if self._done:
            return []
        if self._generation <= self._settings.generations:
            self._asked = self._algorithm.ask()
        if self._asked is None:  # after the last generation, or when pymoo breeds nothing new
            return self._requests(self._at_budget())
        return self._requests([tuple(int(level) for level in row) for row in self._asked.get("X")])

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Let pymoo select among parents and offspring."""
        for outcome in outcomes:
            self._scored[outcome.request.allocation] = outcome.loss
        if self._asked is None:
            self._done = True
            return
        objectives = [[o.loss, self._space.cost(o.request.allocation, self._cost)] for o in outcomes]
        self._asked.set("F", np.array(objectives, dtype=float))
        self._algorithm.tell(infills=self._asked)
        self._asked = None
        self._generation += 1

    def ended(self) -> str:
        """Return why nothing more is asked."""
        return f"all {self._settings.generations} generations are done"

    def finalists(self) -> Sequence[Allocation]:
        """Return what fills the budget, best first."""
        filled = [a for a in self._scored if fits(self._space, a, self._budget) and a == self._repaired(a)]
        return sorted(filled, key=lambda allocation: (self._scored[allocation], allocation))

    def _initial(self, upper: np.ndarray, start: Sequence[Allocation]) -> np.ndarray:
        rng = np.random.default_rng([self._seed, 0])
        size = self._settings.population
        rows = [np.array(allocation) for allocation in start[: size // 4]]
        rows += [np.round(share * upper).astype(int) for share in np.linspace(0.0, 1.0, size // 2)]
        rows += [rng.integers(0, upper + 1) for _ in range(size - len(rows))]
        return np.stack(rows)

    def _repaired(self, allocation: Allocation) -> Allocation:
        return repair(self._space, allocation, self._budget, range(len(allocation)))

    def _at_budget(self) -> list[Allocation]:
        def distance(allocation: Allocation) -> tuple[int, float]:
            away = abs(self._space.cost(allocation, self._cost) - self._budget.limits[self._cost])
            return away, self._scored[allocation]

        members = [tuple(int(level) for level in row) for row in self._algorithm.opt.get("X")]
        return list(dict.fromkeys(self._repaired(member) for member in sorted(set(members), key=distance)))[:8]

    def _requests(self, allocations: Sequence[Allocation]) -> list[Request]:
        return [Request(allocation, self._settings.tokens) for allocation in allocations]
