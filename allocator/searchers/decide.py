"""From a budget to a decision: baselines, the search, and the choice of the winner on text of its own.

Everything here asks the journal first, so a finished run can be replayed without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, cast

from allocator.core.budget import Budget, denser_moves, fits
from allocator.core.costs import COSTS
from allocator.core.effort import Effort, Limit
from allocator.core.errors import UserError
from allocator.core.front import minimised
from allocator.core.journal import Journal
from allocator.core.protocols import AllocationEvaluator, Outcome, Request, Searcher
from allocator.core.space import Allocation, SearchSpace
from allocator.searchers.coarse_to_fine import Round
from allocator.searchers.loop import Listener, Measurer, search
from allocator.searchers.methods.auto import ModelBased, model_based
from allocator.searchers.methods.bayesian import Bayesian, GpSettings, TpeSettings
from allocator.searchers.methods.emo_pms import EmoPmsSettings
from allocator.searchers.methods.evolution import EvolutionSettings, ExchangeEvolution
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.methods.nsga import NsgaSettings
from allocator.searchers.methods.presets import PRESETS
from allocator.searchers.methods.steady import SteadyEvolution, SteadySettings
from allocator.searchers.methods.sweep import SweepSettings
from allocator.searchers.methods.thompson import Thompson, ThompsonSettings
from allocator.searchers.methods.trust_region import TrustRegionSettings
from allocator.searchers.rules.baselines import two_rate, uniform

Method = Literal[
    "auto",
    "trust_region",
    "guided",
    "evolution",
    "evopress",
    "darwinlm",
    "tyr",
    "steady",
    "sweep",
    "nsga2",
    "nsga3",
    "emo_pms",
    "tpe",
    "gp",
    "thompson",
]

FRONTS = ("sweep", "nsga2", "nsga3", "emo_pms", "tpe", "gp")
"""Methods that serve objectives beside the loss."""

ONLY_FRONTS = FRONTS[:4]
"""Those of them that serve nothing else."""

ONE_LOSS = ("sweep", "emo_pms")
"""Those that serve no other measurement than the loss."""

Own: TypeAlias = (
    EvolutionSettings | SteadySettings | NsgaSettings | EmoPmsSettings | TpeSettings | GpSettings | ThompsonSettings
)

FINALISTS = 4
"""Allocations that are measured again on the selection split, of which the best is the plan."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Which method searches, how much it may spend, and the settings of each method.

    Attributes:
        method: Which method searches. ``auto`` is the trust-region knapsack followed by guided evolution; for a front,
            a run's configuration has what :func:`best_for` says in its place. ``evopress``, ``darwinlm`` and ``tyr``
            are evolution with published numbers.
        tokens: Fidelities of ``auto``, ``trust_region`` and ``guided``, increasing: the first is for profiles.
        budget: What the search may spend, such as ``300 evaluations``, ``2e6 tokens`` or ``20 minutes``; None for
            what its own settings ask for. Baselines and selection come on top.
        steady: Of evolution without generations, whose proposals are measured while others are still under way.
        sweep: Of a front by budgets that go on from each other.
        nsga: Of NSGA-II and NSGA-III.
        emo_pms: Of a front by groups of blocks that evolve side by side.
        rounds: How often the search is done, each time on ladders of half the step around what was found; a run has
            two by ``auto`` unless its ladders were given. Rounds share the budget, and what one and its baselines
            leave of evaluations or tokens is the next one's; without a budget, each asks for what the method's settings
            ask for. All rounds but the last are brief: nothing is selected, the last of ``tokens`` is left out, and
            ``auto`` ends after its trust region.
    """

    method: Method = "auto"
    tokens: tuple[int, ...] = (512, 2048, 8192)
    budget: str | int | None = None
    rounds: int = 1
    trust_region: TrustRegionSettings = field(default_factory=TrustRegionSettings)
    guided: GuidedSettings = field(default_factory=GuidedSettings)
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    steady: SteadySettings = field(default_factory=SteadySettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    nsga: NsgaSettings = field(default_factory=NsgaSettings)
    emo_pms: EmoPmsSettings = field(default_factory=EmoPmsSettings)
    tpe: TpeSettings = field(default_factory=TpeSettings)
    gp: GpSettings = field(default_factory=GpSettings)
    thompson: ThompsonSettings = field(default_factory=ThompsonSettings)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"search.rounds: expected at least 1, found {self.rounds}")
        assert self.budget is None or Limit.parse(str(self.budget)).amount > 0
        if list(self.tokens) != sorted({*self.tokens}) or not self.tokens or self.tokens[0] < 1:
            raise UserError(f"search.tokens: expected increasing counts, found {list(self.tokens)}")
        if self.evolution.training and not isinstance(self.own, EvolutionSettings):
            raise UserError(
                "search.evolution.training: evolution alone trains its candidates, and search.method is "
                f"{self.method}. Use search.method=evolution, or leave training out"
            )

    def serve(self, loss: str, objectives: Sequence[str]) -> None:
        """Check that the method serves a loss and objectives beside it, or in its place.

        Raises:
            UserError: It does not, they make no front, or the search has several rounds.
        """
        names = minimised(loss, objectives)
        if objectives and len(names) == 1:
            raise UserError(f"objectives: {names[0]} alone makes no front. Name a cost, or another domain, beside it")
        if objectives and self.method not in FRONTS:
            raise UserError(f"objectives: {self.method} serves the loss alone. Use --method {' or '.join(FRONTS)}")
        if not objectives and self.method in ONLY_FRONTS:
            raise UserError(
                f"search.method: {self.method} finds a front, and nothing is an objective. Name something, such as "
                "--objective params, or use another method"
            )
        if self.method in ONE_LOSS and not set(objectives) <= set(COSTS):
            several = " or ".join(method for method in FRONTS if method not in ONE_LOSS)
            raise UserError(f"objectives: {self.method} serves the loss beside costs. Use --method {several}")
        if self.method == "nsga3" and self.nsga.population < 2 * len(names):
            raise UserError(
                f"search.nsga.population: {len(names)} objectives take at least {2 * len(names)} members, "
                f"found {self.nsga.population}"
            )
        if objectives and self.rounds > 1:
            raise UserError("search.rounds: a front is searched in one round. Leave search.rounds out")

    def limit(self, earlier: Sequence[Mapping[str, Any]] = ()) -> Limit | None:
        """Return the budget of the round that follows others: an equal share, and what these left of theirs."""
        if self.budget is None:
            return None
        whole = Limit.parse(str(self.budget))
        share = whole.amount / self.rounds
        spent = {"evaluations": "evaluations", "tokens": "candidate_tokens"}.get(whole.kind)
        left = whole.amount - sum(line[spent] for line in earlier) if spent else 0.0
        return replace(whole, amount=max(share, left / (self.rounds - len(earlier))))

    def in_round(self, number: int) -> SearchSettings:
        """Return the settings of a round, the first being 1: those that another follows do without the last fidelity.

        Methods with tokens of their own keep them.
        """
        return replace(self, tokens=self.tokens[:-1] or self.tokens) if self.brief(number) else self

    def brief(self, number: int) -> bool:
        """Whether another round follows the one of a number."""
        return number < self.rounds

    @property
    def own(self) -> Own | None:
        """Settings of a method that does not learn a model from races; None for one that does."""
        if self.method in ("evolution", *PRESETS):
            return self.evolution
        others: dict[str, Own] = {
            "nsga2": self.nsga,
            "nsga3": self.nsga,
            "emo_pms": self.emo_pms,
            "thompson": self.thompson,
            "steady": self.steady,
            "gp": self.gp,
            "tpe": self.tpe,
        }
        return others.get(self.method)

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the method's measurements, increasing."""
        if isinstance(self.own, NsgaSettings | EmoPmsSettings):
            return tuple(sorted({self.own.profile, self.own.tokens}))
        tokens = self.tokens if self.own is None else self.own.tokens
        return (tokens,) if isinstance(tokens, int) else tokens

    @property
    def lag(self) -> int:
        """Batches that are asked for ahead of what the method was told."""
        return self.steady.lag if self.method == "steady" else 0

    @property
    def training(self) -> int:
        """Tokens on which a candidate is trained before its last measurement; 0 for none."""
        return self.evolution.training[-1] if self.evolution.training else 0

    @property
    def num_batches(self) -> int | None:
        """Batches that the method will ask for, baselines included, if it says; small spaces may end sooner."""
        if self.own is None:
            return None
        if isinstance(self.own, EvolutionSettings):
            return 2 + self.own.generations * len(self.own.tokens)
        if isinstance(self.own, NsgaSettings):
            return 3 + self.own.generations
        if isinstance(self.own, EmoPmsSettings):
            return 3 + self.own.rounds * (3 + self.own.generations)
        if isinstance(self.own, SteadySettings):
            return 2 + self.own.trials
        return 2 + -(-self.own.trials // self.own.batch)


def best_for(objectives: Sequence[str]) -> Method:
    """Return what ``auto`` is, for what shall be small beside the loss."""
    if not set(objectives) <= set(COSTS):
        return "nsga2"
    return ("auto", "sweep", "emo_pms")[min(len(objectives), 2)]


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen allocation, those it is compared with, all within the budget, and what the choice took.

    Attributes:
        uniform: The same sparsity everywhere.
        two_rate: The best of one sparsity for attention and one for the rest.
        searched: The chosen one.
        losses: Of the chosen one, on the search split and, in the last round, on the selection split; there also
            ``incumbent``, of what the round before chose, if there was one.
        ended: Why the search ended.
        spent: On measurements, selection included.
    """

    uniform: Allocation
    two_rate: Allocation
    searched: Allocation
    losses: Mapping[str, float]
    ended: str
    spent: Effort


def make_searcher(
    space: SearchSpace,
    budget: Budget,
    start: Sequence[Allocation],
    settings: SearchSettings,
    seed: int,
    brief: bool = False,
) -> Searcher:
    """Return the searcher that the settings name, beginning at ``start``; ``brief`` where another round follows."""
    own = settings.own
    if own is None:
        name, near, far = cast(ModelBased, settings.method), settings.trust_region, settings.guided
        return model_based(name, space, budget, start, settings.tokens, near, far, seed, brief)
    if isinstance(own, EvolutionSettings):
        return ExchangeEvolution(space, budget, start, own, seed)
    if isinstance(own, SteadySettings):
        return SteadyEvolution(space, budget, start, own, seed)
    if isinstance(own, ThompsonSettings):
        return Thompson(space, budget, start, own, seed)
    assert isinstance(own, TpeSettings | GpSettings), "fronts are searched by allocator.searchers.fronts"
    return Bayesian(space, budget, (), start, own, seed)


def decide(
    space: SearchSpace,
    budget: Budget,
    settings: SearchSettings,
    seed: int,
    selection_tokens: int,
    evaluator: AllocationEvaluator,
    journal: Journal,
    listen: Listener = lambda outcomes: None,
    phase: Callable[[str], None] = lambda name: None,
    begun: Round | None = None,
) -> Decision:
    """Measure the baselines, search from them, and choose among the finalists on the selection split.

    Finalists of a search that trains are trained as in its last stage, for that is what they are finalists in. The
    baselines are compared with each other as they are.

    In a round that follows another, the search begins at what that chose, which is also a finalist. A round that
    another follows tells where finer ladders belong, and nothing else: its choice is the best of the search.

    Args:
        space: What may be pruned.
        budget: What every allocation keeps to.
        settings: The method and its settings.
        seed: Of the search.
        selection_tokens: Tokens of the selection split on which finalists are compared.
        evaluator: Measures what the journal does not know.
        journal: Answers first, and records.
        listen: Called with the outcomes of every batch of the search.
        phase: Called with the name of each phase.
        begun: What this round begins with, if it follows another.
    """
    number = 1 if begun is None else begun.number
    brief, settings = settings.brief(number), settings.in_round(number)
    tokens, training = settings.fidelities[-1], settings.training
    phase("baselines")
    even = uniform(space, budget) if begun is None else begun.uniform
    sweep = two_rate(space, budget) if begun is None else [begun.two_rate]
    incumbents = [] if begun is None else [begun.incumbent]
    measurer = Measurer(evaluator, journal)
    scored = measurer.measure([Request(a, tokens) for a in dict.fromkeys([even, *sweep, *incumbents])])
    measurer.require([even, *incumbents])
    listen(scored)
    best_two_rate = _best([o for o in scored if o.request.allocation in set(sweep)]).request.allocation
    phase("search")
    starts = [even] if settings.method in PRESETS else list(dict.fromkeys([even, best_two_rate]))
    searcher = make_searcher(space, budget, incumbents or starts, settings, seed, brief)
    limit = settings.limit(() if begun is None else begun.earlier)
    ended = search(searcher, measurer, listen, limit, settings.lag)
    losses: dict[str, float] = {}
    if brief:
        winner = searcher.finalists()[0]
    else:
        phase("selection")
        found = [allocation for allocation in searcher.finalists() if allocation not in measurer.failed]
        finalists = dict.fromkeys([*incumbents, *found[:FINALISTS]])
        selected = measurer.measure([Request(a, selection_tokens, "selection", training) for a in finalists])
        chosen = _best(measurer.sound(selected))
        winner = chosen.request.allocation
        losses = {"selection": chosen.loss, **({"incumbent": selected[0].loss} if incumbents else {})}
    searched = measurer.measure([Request(winner, tokens, training=training)])[0]
    assert fits(space, winner, budget), "every searcher keeps to the budget"
    assert not denser_moves(space, winner, budget), "every searcher fills the budget"
    return Decision(even, best_two_rate, winner, {"search": searched.loss, **losses}, ended, measurer.spent)


def _best(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=lambda outcome: (outcome.loss, outcome.request.allocation))
