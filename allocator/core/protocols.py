"""The seams of the search: requests and outcomes, who proposes allocations and who measures them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from allocator.core.space import Allocation

Probe = Literal["", "influence", "expansion"]
"""What is measured in addition to the loss; see :class:`Request`."""

Key = tuple[Allocation, str, int, int, Probe, int]

FEATURES = "features"
"""Name of the loss of a request that runs only some blocks; see :attr:`Request.blocks`."""

Fidelity = tuple[str, int, int, int]

BEFORE = "_before"
"""Suffix of the name of a measurement that was made before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Measure one allocation on the first ``tokens`` tokens of a split.

    The tokens of a low fidelity are a prefix of the tokens of a higher one, so outcomes of one stage are paired. The
    same holds for training tokens.

    Attributes:
        allocation: One level per unit.
        tokens: How many tokens of the split it is measured on.
        split: The name of the text.
        training: Tokens on which it is trained before; 0 for none.
        probe: What else to measure. ``influence`` is one figure ``influence.<block>`` for every block of the model at
            this allocation: 1 - cosine of the block's input and output, averaged over tokens. ``expansion`` is how the
            loss changes with the level of every unit, from one backward pass, without training. An evaluator without
            gradients leaves it out.
        blocks: How many blocks are run, from the first; 0 for the whole model. The output of the last of them is
            compared with its output in the dense model. The loss is then ``features``: the squared distance of the two
            outputs relative to the square of the dense one, averaged over tokens. Units of blocks that are not run are
            dense.
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
        """What comparable outcomes have in common: the split, its tokens, training tokens and blocks."""
        return (self.split, self.tokens, self.training, self.blocks)


@dataclass(frozen=True, slots=True)
class Expansion:
    """How the loss changes around an allocation, for every level of every unit while the others keep their levels.

    To second order, putting unit u at level l changes the loss by ``slope[u][l]`` + c_u · ``size[u][l]``. A few
    measurements give the curvature c_u of each unit. Both figures are 0 at the level that the unit has.

    Attributes:
        slope: Inner product of the loss's gradient in the unit's weights and the change of these weights.
        size: Mean over tokens of the squared change of the unit's output.
    """

    slope: tuple[tuple[float, ...], ...]
    size: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answer to a request.

    Attributes:
        request: The request.
        measured: Figures by name: the loss; ``nll``, the negative log-likelihood in nats per token; those of the probe;
            after training, also the loss before it as ``<loss>_before``.
        wall_s: Seconds that it took. Work that a batch shares is counted once.
        loss_name: The measurement that a search minimises.
        sequence_losses: The loss on each sequence of the text, in order; may be empty. Two allocations measured on the
            same text are compared sequence by sequence, and the spread of the differences gives their standard error.
        expansion: The expansion, if it was requested and the evaluator has gradients.
        failed: Why nothing could be measured; empty if it could.
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
        """The loss that a search minimises: ``kl`` from the dense model in nats per token by default."""
        return self.measured[self.loss_name]

    @property
    def loss_before(self) -> float | None:
        """The loss before training; None if there was no training."""
        return self.measured.get(f"{self.loss_name}{BEFORE}")


class Searcher(Protocol):
    """Proposes allocations and learns from outcomes.

    All randomness is a function of the seed and of the outcomes so far. So a searcher that is rebuilt from its settings
    and told the same outcomes continues the same search.
    """

    def ask(self) -> Sequence[Request]:
        """Return the next batch of requests; empty when the search is over."""
        ...

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Take the outcomes of the oldest batch that was not told yet, in the order of its requests."""
        ...

    def ended(self) -> str:
        """Return why the search ended, in words."""
        ...

    def finalists(self) -> Sequence[Allocation]:
        """Return the best allocations so far within the budget, best first."""
        ...


class AllocationEvaluator(Protocol):
    """Measures allocations; in process, or on a pool of workers."""

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Start measuring, in the background if there are workers, and yield outcomes as they come, in any order.

        It may be called again before all outcomes of an earlier call are there. An iterator may then yield outcomes of
        another call. It ends when each of its own requests was answered by one of the iterators.
        """
        ...
