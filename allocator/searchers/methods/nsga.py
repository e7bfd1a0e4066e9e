"""NSGA-II and NSGA-III by pymoo: whole fronts of the loss against costs.

Deb et al., 2002, and Deb and Jain, 2014, as implemented by pymoo and driven through its ask and tell, with operators
for levels. The first population holds equal sparsities and the front of an additive profile. The profile measures each
unit alone at the middle of its ladder on few tokens, and takes its loss to grow with the square of its sparsity.
Parents swap runs of whole blocks, because neighbouring blocks are adapted to each other. Mutation exchanges levels
between two units or moves one. Costs need no measurement, and an allocation that exceeds the budget is made sparser
until it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.repair import NoRepair, Repair
from pymoo.core.termination import NoTermination
from pymoo.util.ref_dirs import get_reference_directions

from allocator.core.budget import Budget, repair, trim
from allocator.core.errors import UserError
from allocator.core.front import figure
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace, Unit
from allocator.searchers.problem import MethodSettings, SearchProblem
from allocator.searchers.solvers.knapsack import additive_front

AlgorithmName = Literal["nsga2", "nsga3"]

_MOVES = 3
"""A child is mutated by min(U{1..m}, U{1..m}) moves."""


@dataclass(frozen=True, slots=True)
class NsgaSettings:
    """Settings of NSGA-II and NSGA-III.

    Attributes:
        generations: Number of generations.
        population: Members, and offspring per generation.
        profile: Tokens on which single units are measured.
        tokens: Tokens of every other measurement.
    """

    generations: int = 20
    population: int = 24
    profile: int = 1024
    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.generations < 1 or self.population < 4 or not 1 <= self.profile <= self.tokens:
            raise UserError(
                "search.nsga: expected generations >= 1, population >= 4 and 1 <= profile <= tokens, found "
                f"{self.generations}, {self.population}, {self.profile} and {self.tokens}"
            )


@dataclass(frozen=True, slots=True)
class Nsga2Method(MethodSettings):
    """NSGA-II as a search method, with its settings under ``search.nsga``."""

    nsga: NsgaSettings = field(default_factory=NsgaSettings)

    name: ClassVar[AlgorithmName] = "nsga2"

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the measurements, increasing."""
        return tuple(sorted({self.nsga.profile, self.nsga.tokens}))

    @property
    def num_batches(self) -> int:
        """Batches at most, baselines included."""
        return 3 + self.nsga.generations

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        return Nsga(self.name, problem, self.nsga)


@dataclass(frozen=True, slots=True)
class Nsga3Method(Nsga2Method):
    """NSGA-III as a search method, with its settings under ``search.nsga``."""

    name: ClassVar[AlgorithmName] = "nsga3"

    def check(self, objectives: Sequence[str]) -> None:
        """Check that the population is large enough for the number of objectives.

        Raises:
            UserError: It is not.
        """
        if self.nsga.population < 2 * len(objectives):
            raise UserError(
                f"search.nsga.population: {len(objectives)} objectives take at least {2 * len(objectives)} members, "
                f"found {self.nsga.population}"
            )


class Nsga:
    """NSGA-II or NSGA-III for losses and costs within a budget. If no cost is an objective, the budget is filled."""

    def __init__(self, method: AlgorithmName, problem: SearchProblem, settings: NsgaSettings) -> None:
        """Begin with a profile."""
        self._method, self._settings, self._seed = method, settings, problem.seed
        self._space, self._budget, self._start = problem.space, problem.budget, list(problem.start)
        self._names, self._costs = tuple(problem.objectives), problem.costs
        self._profile = _make_profile(problem.space)
        self._generation = 0
        self._algorithm: Any = None
        self._bred: Population | None = None
        self._asked = [Request(allocation=allocation, tokens=settings.profile) for allocation in self._profile]
        self._end = ""
        if not self._asked:
            self._begin({})

    def ask(self) -> Sequence[Request]:
        """Return the profile, then one generation after another."""
        return self._asked

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Let pymoo select among parents and offspring, and make the next generation."""
        if self._algorithm is None:
            self._begin({outcome.request.allocation: outcome.loss for outcome in outcomes})
            return
        assert self._bred is not None
        figures = [[figure(self._space, outcome, name) for name in self._names] for outcome in outcomes]
        self._bred.set("F", np.array(figures, dtype=float))
        self._algorithm.tell(infills=self._bred)
        self._breed()

    def ended(self) -> str:
        """Return why the search ended."""
        return self._end

    def finalists(self) -> Sequence[Allocation]:
        """Return the members of the last front."""
        return [_to_allocation(row) for row in self._algorithm.opt.get("X")]

    def _begin(self, losses: dict[Allocation, float]) -> None:
        self._algorithm = make_nsga(
            self._method,
            self._space.units,
            self._population(losses),
            self._settings.population,
            len(self._names),
            self._seed,
            _Keep(self._space, self._budget, filled=not self._costs),
        )
        self._breed()

    def _breed(self) -> None:
        self._asked, self._end = [], f"all {self._settings.generations} generations are done"
        if self._generation == self._settings.generations + 1:
            return
        self._generation += 1
        self._bred = self._algorithm.ask()
        if self._bred is None or not len(self._bred):
            self._end = "nothing new is bred"
            return
        self._asked = [
            Request(allocation=_to_allocation(row), tokens=self._settings.tokens) for row in self._bred.get("X")
        ]

    def _population(self, losses: dict[Allocation, float]) -> list[Allocation]:
        """Return distinct allocations: starts, members of the profile's front, equal sparsities, random ones."""
        space, size, keep = self._space, self._settings.population, repair if not self._costs else trim
        rng = np.random.default_rng([self._seed, 0])
        grown = [_extrapolate(space, losses, index) for index in range(len(space.units))]
        front = [allocation for _, _, allocation in additive_front(space, (*self._costs, "params")[0], grown)]
        places = np.linspace(0, len(front) - 1, size // 2)
        upper = np.array(space.sparsest)
        drawn = [
            *self._start[: size // 4],
            *(front[round(place)] for place in places),
            *(_to_allocation(np.round(share * upper)) for share in np.linspace(0.0, 1.0, size // 4)),
        ]
        inside = dict.fromkeys(keep(space, allocation, self._budget, range(len(upper))) for allocation in drawn)
        for _ in range(10 * size):
            if len(inside) >= size:
                break
            levels = rng.integers(0, upper + 1)
            inside[keep(space, _to_allocation(levels), self._budget, rng.permutation(len(upper)).tolist())] = None
        return list(inside)[:size]


def make_nsga(
    method: AlgorithmName,
    units: Sequence[Unit],
    first: Sequence[Sequence[int]],
    size: int,
    objectives: int,
    seed: int,
    repair: Repair | None = None,
) -> Any:
    """Return pymoo's algorithm over the levels of some units, ready to be asked.

    Args:
        method: Name of the algorithm.
        units: The units whose levels are genes.
        first: The first population, levels of each unit.
        size: Members of every later population.
        objectives: Number of objectives.
        seed: Of all random choices.
        repair: Moves offspring into a budget.
    """
    upper = np.array([unit.num_levels - 1 for unit in units])
    problem = Problem(n_var=len(upper), n_obj=objectives, xl=np.zeros_like(upper), xu=upper, vtype=int)
    operators: dict[str, Any] = {
        "pop_size": size,
        "sampling": np.array(first),
        "crossover": _SwapBlocks(np.array([unit.block for unit in units])),
        "mutation": _MoveLevels(),
        "repair": repair or NoRepair(),
        "eliminate_duplicates": True,
    }
    if method == "nsga3":
        algorithm = NSGA3(get_reference_directions("energy", objectives, size, seed=seed), **operators)
    else:
        algorithm = NSGA2(**operators)
    algorithm.setup(problem, termination=NoTermination(), seed=seed)
    return algorithm


def _make_profile(space: SearchSpace) -> list[Allocation]:
    """Return allocations with one unit at the middle of its ladder and all others dense."""
    return [_prune_alone(space, index) for index, unit in enumerate(space.units) if unit.num_levels > 1]


def _prune_alone(space: SearchSpace, index: int) -> Allocation:
    return tuple(_find_middle(space, index) if other == index else 0 for other in range(len(space.units)))


def _find_middle(space: SearchSpace, index: int) -> int:
    return max(1, (space.units[index].num_levels - 1) // 2)


def _extrapolate(space: SearchSpace, losses: dict[Allocation, float], index: int) -> list[float]:
    """Return the estimated loss of each level of a unit, from the measured loss of one."""
    unit = space.units[index]
    if unit.num_levels == 1:
        return [0.0]
    rate = max(losses[_prune_alone(space, index)], 0.0) / max(unit.sparsity(_find_middle(space, index)), 1e-9) ** 2
    return [rate * unit.sparsity(each) ** 2 for each in range(unit.num_levels)]


def _to_allocation(row: np.ndarray) -> Allocation:
    return tuple(int(level) for level in row)


class _SwapBlocks(Crossover):  # type: ignore[misc]
    """Two parents swap the units of a contiguous run of blocks."""

    def __init__(self, block_u: np.ndarray) -> None:
        super().__init__(2, 2)
        self._block_u = block_u

    def _do(self, problem: Problem, x_pmu: np.ndarray, *_: Any, random_state: Any = None, **__: Any) -> np.ndarray:
        children = x_pmu.copy()
        blocks = np.unique(self._block_u)
        for mating in range(x_pmu.shape[1]):
            first, last = np.sort(random_state.integers(0, len(blocks), size=2))
            inside = np.isin(self._block_u, blocks[first : last + 1])
            children[0, mating, inside], children[1, mating, inside] = (
                x_pmu[1, mating, inside],
                x_pmu[0, mating, inside],
            )
        return children


class _MoveLevels(Mutation):  # type: ignore[misc]
    """A few moves: a unit one level sparser, another one level denser, or both."""

    def _do(self, problem: Problem, x_nu: np.ndarray, *_: Any, random_state: Any = None, **__: Any) -> np.ndarray:
        moved = x_nu.copy()
        for row in moved:
            for _move in range(int(random_state.integers(1, _MOVES + 1, size=2).min())):
                which = random_state.integers(3)
                giver, taker = random_state.integers(0, len(row), size=2)
                if which != 0:
                    row[giver] = min(row[giver] + 1, problem.xu[giver])
                if which != 1:
                    row[taker] = max(row[taker] - 1, 0)
        return moved


class _Keep(Repair):  # type: ignore[misc]
    """Moves allocations into the budget, round after round over all units, and fills the budget if ``filled``."""

    def __init__(self, space: SearchSpace, budget: Budget, filled: bool) -> None:
        super().__init__()
        self._space, self._budget, self._keep = space, budget, repair if filled else trim

    def _do(self, problem: Problem, x_nu: np.ndarray, **_: Any) -> np.ndarray:
        order = range(len(self._space.units))
        return np.array([self._keep(self._space, _to_allocation(row), self._budget, order) for row in x_nu])
