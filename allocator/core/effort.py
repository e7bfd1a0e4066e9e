"""What measuring costs: evaluations, candidate-tokens, time; and how much of one a search may spend."""

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
"""Tokens, at most, from which an expansion takes the size of changes."""

_EXPANSION_COST = 4
"""Forward passes of the dense model that an expansion takes on its tokens: forward, again block by block, backward
through activations, and the gradient in the weights."""

_SHAPE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([a-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Effort:
    """What was spent.

    Attributes:
        evaluations: Allocations measured, at any fidelity.
        tokens: Candidate-tokens, see :func:`candidate_tokens`.
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
            UserError: It is none of these.
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
        """Whether so much may be spent."""
        return bool(getattr(effort, self.kind) <= self.amount)


class Trained:
    """How far the allocations of a search have been trained, as batch follows batch.

    What is trained in one stage of a search is trained on in its next stages, on the same split. On another split
    training begins anew.
    """

    def __init__(self) -> None:
        self._tokens: dict[tuple[Allocation, str], int] = {}

    def before(self, request: Request) -> int:
        """Tokens that a request need not be trained on again."""
        return min(request.training, self._tokens.get((request.allocation, request.split), 0))

    def note(self, requests: Iterable[Request]) -> None:
        """Take a batch as done."""
        for request in requests:
            if request.training:
                self._tokens[request.allocation, request.split] = request.training


def candidate_tokens(space: SearchSpace, requests: Sequence[Request], trained: Trained | None = None) -> list[float]:
    """Return what each request of a batch costs: tokens times the share of the dense forward that is computed.

    A batch is a trie over blocks: in the order of their levels, each allocation goes on from the boundary between
    blocks up to which it agrees with the one before. What is counted is what one worker with room for all boundaries
    computes, in multiply-accumulates, the head included; several workers, each with a part of the batch, compute
    somewhat more.

    A request with training is measured twice. Before training it is one of the batch; after training it shares nothing
    with others. Tokens that it is newly trained on count three times: backward takes twice what forward takes. The
    gradient of what the model no longer has, or has masked, is counted as not computed, as is the forward.

    What runs some of the blocks is charged with these, and without the head.

    An expansion shares nothing either: it runs in dense shapes, forward and backward, and every level once on a few
    tokens.

    Args:
        space: What may be pruned.
        requests: The batch.
        trained: What was trained in batches before; None for nothing.
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
    """Return how many blocks a request runs."""
    return request.blocks or np.inf
