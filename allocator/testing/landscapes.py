"""Losses that are functions of the allocation alone, with optima that are known.

They stand in place of a model: each is an evaluator for searchers. The generators were fixed before any searcher was
tuned. Every landscape but :class:`Chain` is the mean of eight "sequences", each with terms of its own, so that a low
fidelity is a biased but paired view of the whole, as calibration text is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from allocator.core.budget import Budget
from allocator.core.protocols import FEATURES, Expansion, Outcome, Request
from allocator.core.space import Allocation, SearchSpace
from allocator.testing.spaces import make_even_space, make_uneven_space

TOKENS = 512
"""Tokens of one sequence."""

SEQUENCES = 8


class Chain:
    """A KL that grows with every level, plus what neighbouring units do to each other.

    Attributes:
        terms: Loss of each unit at each level.
        requests: All that was asked.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, interaction: float = 0.3) -> None:
        """Draw the terms; ``interaction`` is the loss of two neighbouring units that are both at full sparsity."""
        rng = np.random.default_rng(seed)
        self.terms = [np.concatenate([[0.0], rng.exponential(size=u.num_levels - 1).cumsum()]) for u in space.units]
        self._interaction, self._space = interaction, space
        self.requests: list[Request] = []

    def kl(self, allocation: Sequence[int]) -> float:
        """Return the KL on infinitely many tokens."""
        sparsities = [u.sparsity(level) for u, level in zip(self._space.units, allocation, strict=True)]
        pairs = sum(a * b for a, b in itertools.pairwise(sparsities))
        return float(sum(t[level] for t, level in zip(self.terms, allocation, strict=True)) + self._interaction * pairs)

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes; the fewer tokens, the higher the loss."""
        for request in requests:
            self.requests.append(request)
            kl = self.kl(request.allocation) * (1 + 1 / request.tokens)
            if request.blocks:
                levels = zip(self._space.units, request.allocation, strict=True)
                assert not any(level for unit, level in levels if unit.block >= request.blocks)
                yield Outcome(request=request, measured={FEATURES: kl}, wall_s=0.0, loss_name=FEATURES)
                continue
            after = {"kl": kl / 2, "kl_before": kl} if request.training else {"kl": kl}
            yield Outcome(request=request, measured={**after, "nll": 2.0 + kl, **self._influences(request)}, wall_s=0.0)

    def _influences(self, request: Request) -> dict[str, float]:
        """Return what blocks still do, which grows with the density of their units."""
        blocks: dict[str, float] = {}
        for unit, level in zip(self._space.units, request.allocation if request.probe else (), strict=False):
            key = f"influence.{unit.block}"
            blocks[key] = blocks.get(key, 0.0) + (1.0 - unit.sparsity(level)) * (1 + unit.block % 3)
        return blocks


@dataclass(frozen=True)
class Pairwise:
    """Additive terms, and bilinear terms between pairs of units.

    Attributes:
        space: Its units.
        terms: Loss of each unit at each level, [sequences, levels], level 0 at 0.
        pairs: Two units, and the loss when both are at full sparsity; it is bilinear in their sparsities.
    """

    space: SearchSpace
    terms: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int, float], ...] = ()

    def parts(self, allocation: Allocation) -> np.ndarray:
        """Return the loss on each sequence."""
        sparsity = [unit.sparsity(level) for unit, level in zip(self.space.units, allocation, strict=True)]
        joint = sum(weight * sparsity[a] * sparsity[b] for a, b, weight in self.pairs)
        own = sum(term[:, level] for term, level in zip(self.terms, allocation, strict=True))
        return np.asarray(own + joint)

    def loss(self, allocation: Allocation) -> float:
        """Return the loss on all sequences."""
        return float(self.parts(allocation).mean())

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes; a fidelity is a prefix of the sequences."""
        for request in requests:
            parts = self.parts(request.allocation)[: request.tokens // TOKENS]
            measured = {"kl": float(parts.mean()), "nll": 2.0 + float(parts.mean())}
            yield Outcome(request=request, measured=measured, wall_s=0.0, sequence_losses=tuple(parts.tolist()))

    def optimum(self, budget: Budget) -> tuple[float, Allocation]:
        """Return the least loss within the budget, certified by a mixed-integer program, and where it is."""
        units, terms = self.space.units, [term.mean(0) for term in self.terms]
        offsets = np.cumsum([0, *(unit.num_levels for unit in units)])
        cost, rows, columns, values, equal = [*np.concatenate(terms)], [], [], [], []
        for index, unit in enumerate(units):
            for level in range(unit.num_levels):
                rows.append(index)
                columns.append(offsets[index] + level)
                values.append(1.0)
        equal += [1.0] * len(units)
        # the local polytope: a table for each pair, whose sums over one side are the levels of the other
        for a, b, weight in self.pairs:
            start, shape = len(cost), (units[a].num_levels, units[b].num_levels)
            cost += [
                weight * units[a].sparsity(i) * units[b].sparsity(j) for i in range(shape[0]) for j in range(shape[1])
            ]
            table = start + np.arange(shape[0] * shape[1]).reshape(shape)
            for side, lines in ((a, table), (b, table.T)):
                for level, line in enumerate(lines):
                    rows += [len(equal)] * (len(line) + 1)
                    columns += [*line, offsets[side] + level]
                    values += [1.0] * len(line) + [-1.0]
                    equal.append(0.0)
        sums = coo_array((values, (rows, columns)), shape=(len(equal), len(cost)))
        spent = np.zeros((1, len(cost)))
        spent[0, : offsets[-1]] = np.concatenate([unit.costs("params") for unit in units])
        integer = np.zeros(len(cost))
        integer[: offsets[-1]] = 1
        found = milp(
            np.array(cost),
            constraints=[
                LinearConstraint(sums.tocsr(), equal, equal),
                LinearConstraint(spent, -np.inf, budget.limits["params"] - self.space.fixed["params"]),
            ],
            bounds=Bounds(0, 1),
            integrality=integer,
            options={"mip_rel_gap": 0.0},
        )
        assert found.status == 0, found.message
        chosen = [int(found.x[a:b].argmax()) for a, b in itertools.pairwise(offsets)]
        return self.loss(tuple(chosen)), tuple(chosen)


def additive(seed: int, monotone: bool = True, **shape: int) -> Pairwise:
    """Convex terms of very unequal scale; where not monotone, some levels do better than denser ones."""
    space, rng = make_even_space(seed, **shape), np.random.default_rng([seed, 1])
    terms = []
    for unit in space.units:
        sparsity = np.array([unit.sparsity(level) for level in range(unit.num_levels)])
        scale = unit.params[0] / 400 * rng.lognormal(0.0, 0.9)
        term = scale * sparsity ** rng.uniform(1.3, 3.0)
        if not monotone:
            term[1:] *= rng.lognormal(0.0, 0.4, size=unit.num_levels - 1)
        each = (
            term * rng.lognormal(0.0, 0.25, size=(SEQUENCES, 1)) * rng.lognormal(0.0, 0.05, size=(SEQUENCES, len(term)))
        )
        terms.append(each * term / np.maximum(each.mean(0), 1e-12))
    return Pairwise(space, tuple(terms))


def planted(seed: int, **shape: int) -> Pairwise:
    """Additive terms, and as many interacting pairs as half of the units, half of them helping each other."""
    base, rng = additive(seed, True, **shape), np.random.default_rng([seed, 2])
    scale = [float(term.mean(0)[-1]) for term in base.terms]
    count = len(scale)
    pairs: dict[tuple[int, int], float] = {}
    while len(pairs) < count // 2:
        a = int(rng.integers(count))
        # every other pair is of neighbours, as attention and MLP of one block or the next are
        b = int((a + rng.integers(1, 4)) % count) if len(pairs) % 2 else int(rng.integers(count))
        if a != b and (min(a, b), max(a, b)) not in pairs:
            sign = 1.0 if len(pairs) % 4 < 2 else -0.6
            pairs[min(a, b), max(a, b)] = sign * rng.uniform(0.5, 1.5) * float(np.sqrt(scale[a] * scale[b]))
    return Pairwise(base.space, base.terms, tuple((a, b, weight) for (a, b), weight in pairs.items()))


@dataclass(kw_only=True)
class Bowl:
    """A positive definite form in positions that units take, for each sequence; it knows its expansions exactly.

    Attributes:
        space: Its units.
        positions: Where each level puts a unit, [levels] for each.
        forms: Of the loss, [sequences, units, units].
        lowest: Where the loss would be 0, [sequences, units].
        length: Tokens of one sequence.
        gradients: Whether it tells expansions.
        requests: All that was asked.
    """

    space: SearchSpace
    positions: tuple[np.ndarray, ...]
    forms: np.ndarray
    lowest: np.ndarray
    length: int = TOKENS
    gradients: bool = True
    requests: list[Request] = field(default_factory=list)

    def parts(self, allocation: Allocation) -> np.ndarray:
        """Return the loss on each sequence."""
        away = self._away(allocation)
        return np.asarray((away * (self.forms @ away[:, :, None])[:, :, 0]).sum(1) / 2)

    def loss(self, allocation: Allocation) -> float:
        """Return the loss on all sequences."""
        return float(self.parts(allocation).mean())

    kl = loss

    def curvature(self, tokens: int) -> np.ndarray:
        """Return what the squared change of each unit costs, [units]."""
        return np.asarray(self.forms[: tokens // self.length].mean(0).diagonal() / 2)

    def expansion(self, allocation: Allocation, tokens: int) -> Expansion:
        """Return how the loss on so many tokens changes with every level of every unit."""
        count = tokens // self.length
        gradient = (self.forms[:count] @ self._away(allocation)[:count, :, None])[:, :, 0].mean(0)
        moves = [position - position[level] for position, level in zip(self.positions, allocation, strict=True)]
        slope = tuple(tuple((g * move).tolist()) for g, move in zip(gradient, moves, strict=True))
        return Expansion(slope, tuple(tuple(np.square(move).tolist()) for move in moves))

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield outcomes; a fidelity is a prefix of the sequences."""
        for request in requests:
            self.requests.append(request)
            yield self.outcome(request)

    def outcome(self, request: Request) -> Outcome:
        """Return the answer to a request."""
        parts = self.parts(request.allocation)[: request.tokens // self.length]
        if request.blocks:
            return Outcome(
                request=request,
                measured={FEATURES: float(parts.mean())},
                wall_s=0.0,
                loss_name=FEATURES,
                sequence_losses=tuple(parts.tolist()),
            )
        measured = {"kl": float(parts.mean()), "nll": 2.0 + float(parts.mean())}
        told = self.gradients and request.probe == "expansion"
        expansion = self.expansion(request.allocation, request.tokens) if told else None
        return Outcome(
            request=request, measured=measured, wall_s=0.0, sequence_losses=tuple(parts.tolist()), expansion=expansion
        )

    def optimum(self, budget: Budget) -> tuple[float, Allocation]:
        """Return the least loss within the budget, and where it is, if only neighbouring units interact.

        Find it by dynamic programming over the cost so far and the level of the last unit.
        """
        form, count = self.forms.mean(0), len(self.positions)
        assert not np.triu(form, 2).any(), "units interact beyond their neighbours"
        pull = (self.forms @ self.lowest[:, :, None])[:, :, 0].mean(0)
        costs = [np.array(unit.costs("params")) for unit in self.space.units]
        grain = int(np.gcd.reduce(np.concatenate(costs)))
        room = (budget.limits["params"] - self.space.fixed["params"]) // grain
        best, before, chosen = np.zeros((1, room + 1)), np.zeros(1), []
        for index, (position, cost) in enumerate(zip(self.positions, costs, strict=True)):
            joint = form[index, index - 1] * position[:, None] * before if index else np.zeros((len(position), 1))
            rows, picks = np.full((len(position), room + 1), np.inf), []
            for level, spent in enumerate((cost // grain).tolist()):
                along = best + joint[level][:, None]
                picks.append(along.argmin(0))
                own = form[index, index] * position[level] ** 2 / 2 - pull[index] * position[level]
                if spent <= room:
                    rows[level, spent:] = along.min(0)[: room + 1 - spent] + own
            chosen.append(np.array(picks))
            best, before = rows, position
        allocation, level = [0] * count, int(best[:, room].argmin())
        for index in reversed(range(count)):
            allocation[index] = level
            room -= int(costs[index][level]) // grain
            level = int(chosen[index][level, room])
        return self.loss(tuple(allocation)), tuple(allocation)

    def _away(self, allocation: Allocation) -> np.ndarray:
        at = [position[level] for position, level in zip(self.positions, allocation, strict=True)]
        return np.asarray(np.array(at) - self.lowest)


def bowl(seed: int, reach: int = 1, space: SearchSpace | None = None, length: int = TOKENS, **shape: int) -> Bowl:
    """A bowl in which units at most ``reach`` apart interact, with its lowest point among sparse levels."""
    space = space or make_uneven_space(seed, **shape)
    rng, count = np.random.default_rng([seed, 3]), len(space.units)
    positions = []
    for unit in space.units:
        sparsity = np.array([unit.sparsity(level) for level in range(unit.num_levels)])
        positions.append(rng.lognormal(0.0, 0.6) * sparsity ** rng.uniform(0.8, 1.8))
    root = np.eye(count)
    for apart in range(1, min(reach, count - 1) + 1):
        root += np.diag(rng.normal(0.0, 0.5 / np.sqrt(reach), size=count - apart), -apart)
    scale = rng.lognormal(0.0, 0.5, size=count) * rng.lognormal(0.0, 0.2, size=(SEQUENCES, count))
    forms = scale[:, :, None] * (root @ root.T) * scale[:, None, :]
    ends = np.array([position[-1] for position in positions])
    lowest = ends * (rng.uniform(-0.2, 0.4, size=count) + rng.normal(0.0, 0.05, size=(SEQUENCES, count)))
    return Bowl(space=space, positions=tuple(positions), forms=forms, lowest=lowest, length=length)
