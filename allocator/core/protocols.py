"""The seams of the search: what is asked, what comes back, who proposes and who measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from allocator.core.space import Allocation

Probe = Literal["", "influence", "expansion"]
"""What is measured beside the loss; see :class:`Request`."""

Key = tuple[Allocation, str, int, int, Probe, int]

FEATURES = "features"
"""The loss of what leaves some of the blocks; see :attr:`Request.blocks`."""

Fidelity = tuple[str, int, int, int]

BEFORE = "_before"
"""What a measurement's name ends in, if it was made before training."""


@dataclass(frozen=True, slots=True)
class Request:
    """Measure one allocation on the first ``tokens`` tokens of a split.

    The tokens of a low fidelity are a prefix of a higher one's, so outcomes of one stage are paired. So are training
    tokens.

    Attributes:
        allocation: One level per unit.
        tokens: Of the split, on which it is measured.
        split: Which text.
        training: Tokens on which it is trained before; 0 for none.
        probe: What else to measure. ``influence``: ``influence.<block>``, for every block of the model at this
            allocation: 1 - cosine of what enters and what leaves it, averaged over tokens. ``expansion``: how the
            loss begins to change with the level of every unit, from one backward pass, without training; an evaluator
            that has no gradients leaves it out.
        blocks: How many blocks are run, from the first; 0 for the whole model. What leaves the last of them is compared
            with what leaves it in the dense model: the loss is ``features``, the squared distance of the two relative
            to the square of the latter, averaged over tokens. Units of blocks that are not run are dense.
    """

    allocation: Allocation
    tokens: int
    split: str = "search"
    training: int = 0
    probe: Probe = ""
    blocks: int = 0

    @property
    def key(self) -> Key:
        """What makes two requests the same."""
        return (self.allocation, self.split, self.tokens, self.training, self.probe, self.blocks)

    @property
    def fidelity(self) -> Fidelity:
        """What two outcomes that can be compared agree in: text, how much of it, how much training, blocks."""
        return (self.split, self.tokens, self.training, self.blocks)


@dataclass(frozen=True, slots=True)
class Expansion:
    """How the loss begins to change around an allocation, for every level of every unit, the others staying.

    To second order, putting unit u at level l changes the loss by ``slope[u][l]`` + c_u · ``size[u][l]``: a curvature
    c_u for each unit, which a few measurements tell. Both are 0 at the unit's own level.

    Attributes:
        slope: Inner product of the loss's gradient in the unit's weights and of their change.
        size: Mean over tokens of the squared change of the unit's output.
    """

    slope: tuple[tuple[float, ...], ...]
    size: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request measured.

    Attributes:
        request: What was asked.
        measured: By name: the loss, and ``nll``, the negative log-likelihood in nats per token; what else was asked
            for; after training, also the loss before it as ``<loss>_before``.
        wall_s: Seconds that it took; what a batch shares is counted once.
        loss_name: The measurement that a search minimises.
        sequence_losses: It for each sequence of the text, in order: two allocations measured on the same text differ by
        the
            mean of their differences part by part, whose spread tells how sure that is. Perhaps empty.
        expansion: If it was asked for, and the evaluator has gradients.
        failed: Why nothing could be measured; empty where it could.
    """

    request: Request
    measured: Mapping[str, float]
    wall_s: float
    loss_name: str = "kl"
    sequence_losses: tuple[float, ...] = ()
    expansion: Expansion | None = None
    failed: str = ""

    @property
    def loss(self) -> float:
        """What a search minimises: ``kl`` (from the dense model, nats per token), unless the run chose another."""
        return self.measured[self.loss_name]

    @property
    def loss_before(self) -> float | None:
        """The loss before training; None for what was not trained."""
        return self.measured.get(f"{self.loss_name}{BEFORE}")


class Searcher(Protocol):
    """Proposes allocations and learns from outcomes.

    All randomness is a function of the seed and of what was told, so that a searcher rebuilt from its
    settings and told the same outcomes continues the same search.
    """

    def ask(self) -> Sequence[Request]:
        """Return the next batch to measure; empty when the search is over."""
        ...

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Take the outcomes of the last batch, in the order of its requests."""
        ...

    def ended(self) -> str:
        """Return why nothing more is asked, in words."""
        ...

    def finalists(self) -> Sequence[Allocation]:
        """Return the best allocations so far within the budget, best first."""
        ...


class AllocationEvaluator(Protocol):
    """Measures allocations; in process, or on a pool of workers."""

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Begin to measure where that goes on by itself, and yield outcomes as they come, in any order.

        More may be asked for before all of it is there: then an iterator may yield what others would, and ends when
        each of its own requests was answered by one of them.
        """
        ...
