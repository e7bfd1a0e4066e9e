"""The effort of measuring, in evaluations, candidate-tokens or time, and limits on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from allocator.core.errors import UserError
from allocator.core.protocols import Probe, Request
from allocator.core.space import Allocation, SearchSpace

Kind = Literal["evaluations", "tokens", "minutes"]

_TRAINING_COST = 3
"""Forward passes that one training step over the same tokens takes."""

EXPANSION_POSITIONS = 128
"""Most tokens on which an expansion measures the size of changes."""

_EXPANSION_COST = 4
"""Forward passes of the dense model that an expansion takes on its tokens: forward, forward again block by block,
backward through activations, and the gradient in the weights."""

_SHAPE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([a-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Effort:
    """Effort that was spent.

    Attributes:
        evaluations: Allocations measured, at any fidelity.
        tokens: Candidate-tokens; see :func:`candidate_tokens`.
        minutes: Wall-clock time.
    """

    evaluations: int = 0
    tokens: float = 0.0
    minutes: float = field(default=0.0, compare=False)

    def __sub__(self, other: Effort) -> Effort:
        return Effort(self.evaluations - other.evaluations, self.tokens - other.tokens, self.minutes - other.minutes)


@dataclass(frozen=True, slots=True)
class Limit:
    """How much a search may spend of one kind of effort."""

    amount: float
    kind: Kind

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read ``300``, ``300 evaluations``, ``2e6 tokens`` or ``20 minutes``.

        Raises:
            UserError: The text has another form.
        """
        match = _SHAPE.fullmatch(text)
        kinds: dict[str, Kind] = {"": "evaluations", **{kind: kind for kind in get_args(Kind)}}
        if match is None or match[2] not in kinds or float(match[1]) <= 0:
            raise UserError(
                f"budget: expected an amount such as '300 evaluations', '2e6 tokens' or '20 minutes', found {text!r}"
            )
        return cls(float(match[1]), kinds[match[2]])

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.kind}"

    def allows(self, effort: Effort) -> bool:
        """Whether an effort is within the limit."""
        return bool(getattr(effort, self.kind) <= self.amount)


class Trained:
    """How far the allocations of a search have been trained.

    On the same split, the next stages of a search continue the training of an allocation. On another split, training
    starts from the beginning.
    """

    def __init__(self) -> None:
        self._tokens: dict[tuple[Allocation, str], int] = {}

    def before(self, request: Request) -> int:
        """Return on how many of a request's training tokens its allocation was trained already."""
        return min(request.training, self._tokens.get((request.allocation, request.split), 0))

    def note(self, requests: Iterable[Request]) -> None:
        """Record that a batch is done."""
        for request in requests:
            if request.training:
                self._tokens[request.allocation, request.split] = request.training


def candidate_tokens(space: SearchSpace, requests: Sequence[Request], trained: Trained | None = None) -> list[float]:
    """Return the cost of each request of a batch: its tokens times the share of the dense forward that is computed.

    A batch is a trie over blocks. Sorted by levels, each allocation starts at the block boundary up to which it agrees
    with the one before. The count is the multiply-accumulates, head included, of one worker that has room for all
    boundary states. Several workers that share a batch compute somewhat more.

    A request with training is measured twice. Before training it is part of the batch; after training it shares nothing
    with other requests. New training tokens count three times, because backward takes twice as long as forward. Neither
    forward nor gradient is counted for weights that are removed or masked.

    A request that runs only some of the blocks costs these blocks, without the head.

    An expansion shares nothing either. It runs forward and backward in dense shapes, and every level once on a few
    tokens.

    Args:
        space: What may be pruned.
        requests: The batch.
        trained: Training in earlier batches; None for none.
    """
    macs = [np.array(unit.macs, dtype=float) for unit in space.units]
    blocks = np.array([unit.block for unit in space.units])
    groups: dict[tuple[str, int, Probe], list[int]] = {}
    costs = [0.0] * len(requests)
    dense = space.cost(space.dense, "macs")
    all_levels = sum((unit.num_levels - 1) * unit.macs[0] for unit in space.units) / dense
    for index, request in enumerate(requests):
        if request.probe == "expansion":
            costs[index] = _EXPANSION_COST * request.tokens + min(request.tokens, EXPANSION_POSITIONS) * all_levels
        else:
            groups.setdefault((request.split, request.tokens, request.probe), []).append(index)
    for (_, tokens, _), members in groups.items():
        before, known = np.full(len(blocks), -1), 0.0
        for index in sorted(members, key=lambda member: (requests[member].allocation, _end(requests[member]))):
            levels, end = np.array(requests[index].allocation), _end(requests[index])
            changed = np.flatnonzero(levels != before)
            start = min(known, blocks[changed[0]] if len(changed) else np.inf)
            computed = sum(macs[unit][levels[unit]] for unit in np.flatnonzero((blocks >= start) & (blocks < end)))
            head = space.fixed["macs"] if end == np.inf else 0
            costs[index] = tokens * (head + float(computed)) / dense
            before, known = levels, end
    for index, request in enumerate(requests):
        if request.training:
            fresh = request.training - (0 if trained is None else trained.before(request))
            costs[index] += space.compute_share(request.allocation) * (request.tokens + _TRAINING_COST * fresh)
    return costs


def _end(request: Request) -> float:
    """Return the number of blocks that a request runs; infinity for the whole model."""
    return request.blocks or np.inf
