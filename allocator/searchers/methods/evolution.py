"""Exchange evolution: (1+λ), elitist, with offspring that trade levels and selection in stages.

After EvoPress (Sieberling et al., ICML 2025): offspring are the parent with min(U{1..m}, U{1..m}) exchanges,
selection is staged over growing token sets, and the parent competes in the last stage. It departs from the
paper in five ways. An exchange may cross unit kinds and step sizes, because the budget is an exact integer sum that is
repaired and filled after it. Where blocks can be removed, one offspring in eight removes or restores a contiguous run
of them, which single exchanges do not find. The tokens of a stage are a prefix of the next stage's and the same in
every generation, so all comparisons are paired. The search ends when nothing improves. No allocation is proposed twice,
so random allocations take over when exchanges reach nothing new.

As in DarwinLM (Tang et al., COLM 2026), candidates may be trained for a while before each stage scores them, because an
allocation that recovers is worth more than one that is good at once. The paper trains candidates from the start in
every stage. Here a stage continues where the stage before ended, which gives the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from allocator.core.budget import Budget, repair
from allocator.core.errors import UserError
from allocator.core.protocols import Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace, Unit
from allocator.searchers.problem import MethodSettings, SearchProblem

_ATTEMPTS_PER_OFFSPRING = 16

_RUN_SHARE = 0.125
"""Share of offspring that remove or restore a run of blocks, where blocks can be removed."""

_LONGEST_RUN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolutionSettings:
    """Settings of exchange evolution.

    Attributes:
        generations: Most generations.
        patience: Generations without a better parent after which the search ends.
        offspring: λ, proposals per generation.
        tokens: Tokens of each stage, increasing.
        survivors: How many are left after each stage; the last is 1, the next parent.
        max_exchanges: m. An offspring differs from its parent by min(U{1..m}, U{1..m}) exchanges.
        within_kind: Whether levels are exchanged between units of one kind and part only, as DarwinLM and Týr do.
        training: Tokens of each stage on which candidates are trained before they are scored, never fewer than in the
            stage before; empty for no training. The paper of DarwinLM has 10K, 50K, 100K and 200K. The trained weights
            are thrown away, and the plan is executed without training.
    """

    generations: int = 16
    patience: int = 6
    offspring: int = 16
    tokens: tuple[int, ...] = (1024, 4096)
    survivors: tuple[int, ...] = (3, 1)
    max_exchanges: int = 3
    within_kind: bool = False
    training: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.generations, self.patience, self.offspring, self.max_exchanges) < 1:
            raise UserError("search.evolution: generations, patience, offspring and max_exchanges must be at least 1")
        if len(self.tokens) != len(self.survivors) or not self.tokens:
            raise UserError(
                f"search.evolution: one number of survivors for each stage, found tokens {list(self.tokens)} "
                f"and survivors {list(self.survivors)}"
            )
        if list(self.tokens) != sorted(set(self.tokens)) or self.tokens[0] < 1:
            raise UserError(f"search.evolution.tokens: expected increasing counts, found {list(self.tokens)}")
        counts = [self.offspring, *self.survivors]
        if counts != sorted(counts, reverse=True) or self.survivors[-1] != 1:
            raise UserError(
                f"search.evolution.survivors: expected counts that fall from offspring ({self.offspring}) to 1, "
                f"found {list(self.survivors)}"
            )
        if self.training and len(self.training) != len(self.tokens):
            raise UserError(
                f"search.evolution.training: expected a count of tokens for each of the {len(self.tokens)} stages, "
                f"found {list(self.training)}. Leave it out to train nothing"
            )
        if self.training and (list(self.training) != sorted(self.training) or self.training[0] < 0):
            raise UserError(
                "search.evolution.training: expected counts that never fall, because each stage continues the training "
                f"of the one before, found {list(self.training)}"
            )
        if self.training and self.training[-1] == 0:
            raise UserError(
                "search.evolution.training: the last stage trains on no tokens. Ask for some, or leave it out"
            )


@dataclass(frozen=True, slots=True)
class EvolutionMethod(MethodSettings):
    """Exchange evolution as a search method, with its settings under ``search.evolution``."""

    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the stages."""
        return self.evolution.tokens

    @property
    def num_batches(self) -> int:
        """Batches at most, baselines included."""
        return 2 + self.evolution.generations * len(self.evolution.tokens)

    @property
    def training(self) -> int:
        """Tokens on which a candidate is trained before the last stage; 0 for none."""
        return self.evolution.training[-1] if self.evolution.training else 0

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        return ExchangeEvolution(problem, self.evolution)


def exchange(
    space: SearchSpace,
    parent: Allocation,
    budget: Budget,
    rng: np.random.Generator,
    times: int,
    within_kind: bool = False,
) -> Allocation:
    """Return ``parent`` after ``times`` exchanges, within the budget and with the budget full.

    One exchange makes a random unit one level sparser and another one level denser, of the same kind and part if
    ``within_kind``. The two steps may differ in cost. Units that were not touched make up for the difference, in random
    order, as far as they can.
    """
    levels = list(parent)
    touched: dict[int, None] = {}
    for _ in range(times):
        givers = [i for i, unit in enumerate(space.units) if levels[i] + 1 < unit.num_levels]
        receivers = [i for i, level in enumerate(levels) if level > 0]
        if not givers or not receivers:
            break
        giver = int(rng.choice(givers))
        if within_kind:
            receivers = [i for i in receivers if _sort(space.units[i]) == _sort(space.units[giver])] or [giver]
        receiver = int(rng.choice(receivers))
        if giver != receiver:
            levels[giver] += 1
            levels[receiver] -= 1
            touched.update({giver: None, receiver: None})
    order = [i for i in rng.permutation(len(levels)).tolist() if i not in touched]
    return repair(space, levels, budget, order, list(touched))


def _sort(unit: Unit) -> tuple[str, str]:
    return unit.kind, unit.part


def move_run(space: SearchSpace, parent: Allocation, budget: Budget, rng: np.random.Generator) -> Allocation:
    """Return ``parent`` with a contiguous run of whole blocks removed, or made dense again, and the budget full.

    The run has min(U{1..4}, U{1..4}) blocks, at most half of all. It is made dense if it was removed, and removed
    otherwise. The other blocks make up for the cost, in random order.
    """
    blocks = sorted({unit.block for unit in space.units})
    length = min(int(rng.integers(1, _LONGEST_RUN + 1, size=2).min()), max(1, len(blocks) // 2))
    start = int(rng.integers(len(blocks) - length + 1))
    inside = [i for i, unit in enumerate(space.units) if unit.block in blocks[start : start + length]]
    levels = list(parent)
    is_removed = all(levels[i] == space.units[i].num_levels - 1 for i in inside)
    for i in inside:
        levels[i] = 0 if is_removed else space.units[i].num_levels - 1
    rest = [i for i in rng.permutation(len(levels)).tolist() if i not in set(inside)]
    return repair(space, levels, budget, rest, inside)


def propose_children(
    space: SearchSpace,
    parent: Allocation,
    budget: Budget,
    rng: np.random.Generator,
    max_exchanges: int,
    within_kind: bool,
    attempts: int,
) -> Iterator[Allocation]:
    """Yield ``attempts`` children of a parent: the first half by exchanges and moves of runs, the others at random.

    In small spaces, all allocations that exchanges reach may be known already.
    """
    blocks_go = all(unit.kept[-1] == 0 for unit in space.units)
    for attempt in range(attempts):
        if blocks_go and attempt < attempts // 2 and rng.random() < _RUN_SHARE:
            yield move_run(space, parent, budget, rng)
        elif attempt < attempts // 2:
            times = int(rng.integers(1, max_exchanges + 1, size=2).min())
            yield exchange(space, parent, budget, rng, times, within_kind)
        else:
            levels = rng.integers([unit.num_levels for unit in space.units]).tolist()
            yield repair(space, levels, budget, rng.permutation(len(levels)).tolist())


class ExchangeEvolution:
    """Exchange evolution for one budget. See the module's text for the method and its source."""

    def __init__(self, problem: SearchProblem, settings: EvolutionSettings) -> None:
        """Begin at the best start."""
        self._problem, self._settings = problem, settings
        self._generation = 0
        self._stage = len(settings.tokens) - 1
        self._candidates: list[Allocation] = list(dict.fromkeys(problem.start))
        self._seen: set[Allocation] = set(self._candidates)
        self._scored: dict[Allocation, float] = {}
        self._parent = self._candidates[0]
        self._stale = 0
        self._end = ""

    def ask(self) -> Sequence[Request]:
        """Return the requests of one stage of one generation."""
        if not self._candidates:
            return []
        tokens = self._settings.tokens[self._stage]
        training = self._settings.training[self._stage] if self._settings.training else 0
        return [Request(allocation=allocation, tokens=tokens, training=training) for allocation in self._candidates]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the survivors of the stage, or begin the next generation."""
        ranked = sorted(outcomes, key=lambda outcome: (outcome.loss, outcome.request.allocation))
        last = len(self._settings.tokens) - 1
        if self._stage < last:
            keep = self._settings.survivors[self._stage]
            self._candidates = [outcome.request.allocation for outcome in ranked[:keep]]
            self._stage += 1
            if self._stage == last:
                self._candidates.append(self._parent)
            return
        for outcome in outcomes:
            self._scored[outcome.request.allocation] = outcome.loss
        best = ranked[0].request.allocation
        self._stale = 0 if best != self._parent or self._generation == 0 else self._stale + 1
        self._parent, self._candidates = best, []
        if self._stale == self._settings.patience:
            self._end = f"no better allocation for {self._stale} generations"
        elif self._generation == self._settings.generations:
            self._end = f"all {self._generation} generations are done"
        else:
            self._candidates = self._offspring()
            self._end = "no allocation is left that was not proposed"
        self._generation += 1
        self._stage = 0
        if last == 0 and self._candidates:
            self._candidates.append(self._parent)

    def ended(self) -> str:
        """Return why the search ended."""
        return self._end

    def finalists(self) -> Sequence[Allocation]:
        """Return the allocations that were scored on all tokens, best first."""
        return sorted(self._scored, key=lambda allocation: (self._scored[allocation], allocation))

    def _offspring(self) -> list[Allocation]:
        settings = self._settings
        rng = np.random.default_rng([self._problem.seed, self._generation])
        attempts = settings.offspring * _ATTEMPTS_PER_OFFSPRING
        children: list[Allocation] = []
        for child in propose_children(
            self._problem.space,
            self._parent,
            self._problem.budget,
            rng,
            max_exchanges=settings.max_exchanges,
            within_kind=settings.within_kind,
            attempts=attempts,
        ):
            if child not in self._seen:
                self._seen.add(child)
                children.append(child)
                if len(children) == settings.offspring:
                    break
        return children
