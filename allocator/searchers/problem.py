"""What a search method needs: the problem that a method is handed, and what its settings must offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from allocator.core.budget import Budget
from allocator.core.protocols import Searcher
from allocator.core.space import Allocation, Cost, SearchSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProblem:
    """What a searcher is asked to solve.

    Attributes:
        space: What may be pruned.
        budget: Limits that every allocation keeps.
        objectives: Names of what is minimised: the loss alone, or the loss (or those of some domains) and costs for a
            front. See :func:`~allocator.core.front.minimised`.
        start: Allocations within the budget with which the search begins; at least one.
        seed: Of all random choices.
        is_last_round: Whether no other round follows. A round that another follows needs only to find where finer
            ladders belong.
    """

    space: SearchSpace
    budget: Budget
    objectives: Sequence[str]
    start: Sequence[Allocation]
    seed: int = 0
    is_last_round: bool = True

    @property
    def costs(self) -> list[Cost]:
        """The objectives that are costs."""
        return [name for name in self.objectives if name in self.space.fixed]


class MethodSettings(Protocol):
    """The settings of a search method, which make its searcher.

    Usually a frozen dataclass. One that inherits from this class needs only :attr:`fidelities` and :meth:`make`.
    """

    __slots__ = ()

    @property
    def fidelities(self) -> tuple[int, ...]:
        """Tokens of the method's measurements, increasing. The last is the fidelity of finalists."""
        ...

    @property
    def num_batches(self) -> int | None:
        """Most batches that the method asks for, baselines included; None if unknown."""
        return None

    @property
    def lag(self) -> int:
        """Batches that are requested before the outcomes of the oldest of them are told, in addition to that one."""
        return 0

    @property
    def training(self) -> int:
        """Tokens on which a candidate is trained before its last measurement; 0 for none."""
        return 0

    def make(self, problem: SearchProblem) -> Searcher:
        """Return the searcher for a problem."""
        ...
