"""The settings of a search: which method, how much it may spend, and a section for the settings of every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from allocator.core.costs import COSTS
from allocator.core.effort import Limit
from allocator.core.errors import UserError
from allocator.core.front import minimised
from allocator.core.user_objects import check_object, make_plain
from allocator.searchers.problem import MethodSettings
from allocator.searchers.registry import METHODS, configure, find_keys, find_sections

CUSTOM = "custom"
"""What ``search.method`` says where the searcher was handed in from Python."""

_NEEDED = ("fidelities", "num_batches", "lag", "training", "make")
"""What the settings of a searcher from Python must have."""


@runtime_checkable
class ChecksObjectives(Protocol):
    """Settings of a method that serves only some lists of objectives."""

    def check(self, objectives: Sequence[str]) -> None:
        """Raise a UserError if the method does not serve these objectives."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedSettings:
    """The keys under ``search`` that belong to no single method. See :class:`SearchSettings`."""

    method: str = "auto"
    tokens: tuple[int, ...] = (512, 2048, 8192)
    budget: str | int | None = None
    rounds: int = 1

    if TYPE_CHECKING:

        def __getattr__(self, section: str) -> Any:
            """Return the settings of a section; :func:`~allocator.searchers.registry.find_sections` has them all."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"search.rounds: expected at least 1, found {self.rounds}")
        assert self.budget is None or Limit.parse(str(self.budget)).amount > 0
        if list(self.tokens) != sorted({*self.tokens}) or not self.tokens or self.tokens[0] < 1:
            raise UserError(f"search.tokens: expected increasing counts, found {list(self.tokens)}")
        for section in find_sections():
            if getattr(getattr(self, section), "training", ()) and section not in find_keys(self.method):
                raise UserError(
                    f"search.{section}.training: {section} alone trains its candidates, and search.method is "
                    f"{self.method}. Use search.method={section}, or leave training out"
                )

    @property
    def configured(self) -> MethodSettings:
        """The settings of the active method.

        Raises:
            UserError: The method is a searcher from Python, and it was not handed in again.
        """
        if self.method == CUSTOM:
            raise UserError(
                f"search.method: '{CUSTOM}' is a searcher that was handed in from Python; pass it again as "
                "allocator.search(searcher=...)"
            )
        return configure(self.method, self)

    @property
    def method_name(self) -> str:
        """The method's name for people. A searcher from Python may have a ``name``."""
        return self.method

    def with_custom(self, searcher: MethodSettings) -> SearchSettings:
        """Return these settings with a searcher from Python in place of the method.

        Raises:
            UserError: It is a class, lacks something, or has settings that cannot be recorded.
        """
        check_object(searcher, "searcher", _NEEDED)
        fidelities = searcher.fidelities
        if not isinstance(fidelities, Sequence) or list(fidelities) != sorted({*fidelities}) or not fidelities:
            raise UserError(
                f"searcher: {type(searcher).__name__}.fidelities: expected increasing counts of tokens, such as "
                f"(512, 2048), found {fidelities!r}"
            )
        shared = {each.name: getattr(self, each.name) for each in fields(SearchSettings)}
        settings = CustomSearchSettings(**{**shared, "method": CUSTOM, "custom": searcher})
        settings.custom_identity()  # raises where a setting cannot be recorded
        return settings

    def custom_identity(self) -> dict[str, Any]:
        """Return what identifies a searcher from Python: its class and settings. Empty for a registered method."""
        return {}

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the method's measurements, increasing."""
        return self.configured.fidelities

    @property
    def num_batches(self) -> int | None:
        """Most batches that the method asks for, baselines included; None if unknown."""
        return self.configured.num_batches

    @property
    def lag(self) -> int:
        """Batches that are requested before the outcomes of the oldest of them are told, in addition to that one."""
        return self.configured.lag

    @property
    def training(self) -> int:
        """Tokens on which a candidate is trained before its last measurement; 0 for none."""
        return self.configured.training

    @property
    def starts_uniform(self) -> bool:
        """Whether the search begins at uniform alone, as published presets of evolution do."""
        return self.method in METHODS and METHODS[self.method].presets is not None

    def check_objectives(self, loss: str, objectives: Sequence[str]) -> None:
        """Check that the method serves a loss, and objectives in addition to it or in its place.

        Raises:
            UserError: The method does not serve them, they make no front, or a front has several rounds.
        """
        names = minimised(loss, objectives)
        if objectives and len(names) == 1:
            raise UserError(f"objectives: {names[0]} alone makes no front. Name a cost or another domain as well")
        if self.method in METHODS:
            self._check_method(names, objectives)
        if objectives and self.rounds > 1:
            raise UserError("search.rounds: a front is searched in one round. Leave search.rounds out")

    def _check_method(self, names: Sequence[str], objectives: Sequence[str]) -> None:
        method = METHODS[self.method]
        if objectives and method.front == "none":
            fronts = [name for name, other in METHODS.items() if other.front != "none"]
            raise UserError(f"objectives: {self.method} serves the loss alone. Use --method {' or '.join(fronts)}")
        if not objectives and not method.one_budget:
            raise UserError(
                f"search.method: {self.method} finds a front, and nothing is an objective. Name something, such as "
                "--objective params, or use another method"
            )
        if method.front == "costs" and not set(objectives) <= set(COSTS):
            several = [name for name, other in METHODS.items() if other.front == "any"]
            raise UserError(
                f"objectives: {self.method} serves the loss and costs alone. Use --method {' or '.join(several)}"
            )
        if isinstance(settings := self.configured, ChecksObjectives):
            settings.check(names)

    def limit(self, earlier: Sequence[Mapping[str, Any]] = ()) -> Limit | None:
        """Return the budget of the round that follows others: an equal share, and what these left of theirs."""
        if self.budget is None:
            return None
        whole = Limit.parse(str(self.budget))
        share = whole.amount / self.rounds
        spent = {"evaluations": "evaluations", "tokens": "candidate_tokens"}.get(whole.kind)
        left = whole.amount - sum(line[spent] for line in earlier) if spent else 0.0
        return replace(whole, amount=max(share, left / (self.rounds - len(earlier))))

    def settings_for_round(self, number: int) -> SearchSettings:
        """Return the settings of a round; the first is 1. Without the last of ``tokens`` if another round follows.

        Methods with tokens of their own keep them.
        """
        assert isinstance(self, SearchSettings)
        return self if self.is_last_round(number) else replace(self, tokens=self.tokens[:-1] or self.tokens)

    def is_last_round(self, number: int) -> bool:
        """Whether no round follows the one with a number."""
        return number >= self.rounds


if TYPE_CHECKING:

    class SearchSettings(_SharedSettings):
        """Static view of :class:`SearchSettings`, without the sections."""

else:
    SearchSettings = make_dataclass(
        "SearchSettings",
        [
            ("method", Literal[(*METHODS, CUSTOM)], "auto"),
            *((name, section, field(default_factory=section)) for name, section in find_sections().items()),
        ],
        bases=(_SharedSettings,),
        namespace={
            "__module__": __name__,
            "__doc__": """Which method searches, how much it may spend, and the settings of each method.

    In addition to the attributes below there is one section for each entry of
    :func:`~allocator.searchers.registry.find_sections`, such as ``evolution``.

    Attributes:
        method: Which method searches, a key of :data:`~allocator.searchers.registry.METHODS`. ``auto`` is the
            trust-region knapsack followed by guided evolution; where a front is searched, a run's configuration has
            the answer of :func:`choose_method` in its place. ``custom`` is a searcher from Python; see
            :meth:`with_custom`.
        tokens: Fidelities of ``auto``, ``trust_region``, ``guided`` and ``sweep``, increasing. The first is for
            profiles.
        budget: What the search may spend, such as ``300 evaluations``, ``2e6 tokens`` or ``20 minutes``; None for
            what the method's own settings allow. Baselines and selection are not counted.
        rounds: How often the search is done. Each round after the first has ladders of half the step around the
            allocation that the round before chose. A run has two rounds by ``auto`` unless its ladders were given.
            Rounds share the budget: evaluations or tokens that a round and its baselines do not use go to the next.
            Without a budget, each round may spend what the method's settings allow. A round that another follows is
            shorter: it selects nothing, it leaves out the last of ``tokens``, and ``auto`` ends after its trust region.
    """,
        },
        frozen=True,
        slots=True,
        kw_only=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomSearchSettings(SearchSettings):
    """Settings of a search whose searcher was handed in from Python.

    It has a field that files do not have, so ``run.yaml`` says ``method: custom`` and nothing more of it.

    Attributes:
        custom: The settings that make the searcher.
    """

    custom: MethodSettings

    @property
    def configured(self) -> MethodSettings:
        """The settings that were handed in."""
        return self.custom

    @property
    def method_name(self) -> str:
        """The searcher's ``name`` if it has one, else ``custom``."""
        return str(getattr(self.custom, "name", CUSTOM))

    def custom_identity(self) -> dict[str, Any]:
        """Return the class of the searcher's settings and, if that is a dataclass, their values.

        The module is left out: a class of a script is ``__main__``'s there, and another module's where it is imported.
        """
        kind = type(self.custom)
        values: dict[str, Any] = {}
        if is_dataclass(self.custom) and not isinstance(self.custom, type):
            values = asdict(self.custom)
        return {"class": kind.__qualname__, "settings": make_plain(values, f"searcher: {kind.__name__}'s settings")}


def choose_method(objectives: Sequence[str]) -> str:
    """Return the method that ``auto`` stands for, given the objectives in addition to the loss."""
    if not set(objectives) <= set(COSTS):
        return "nsga2"
    return ("auto", "sweep", "emo_pms")[min(len(objectives), 2)]
