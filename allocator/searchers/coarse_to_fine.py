"""Coarse to fine: after a search, ladders are drawn anew around what it found, at half the step.

After Týr-the-Pruner (NeurIPS 2025): nine levels around each unit's present sparsity, at a step that is halved from
round to round, units pruned afresh from dense weights on what their predecessors produce in expectation over those
levels, and another search among them. It departs from the paper in seven ways:

- All rounds but the last are of units pruned on dense inputs, side by side, unless that is set otherwise. Rounds may
  follow the incumbent's path in place of the expectation; then whatever differs from the incumbent has weights made for
  another, and seems worse.
- All rounds but the last only tell where finer ladders belong: they select nothing on text of its own, and ``auto``
  ends them with its trust region.
- Every ladder keeps its dense and its sparsest level, so that a whole sub-block may go, or come back, in any round.
- SpaceArrays also keep the levels of the baselines, which so stay what they are and are measured in every round.
- Costs are exact and trade across kinds. The incumbent is filled up to the budget where finer levels leave room.
- Items that are few keep every count, for a step is never less than one of them.
- Any method searches, and the incumbent competes with what it finds on the selection split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from allocator.core.budget import Budget, repair
from allocator.core.space import Allocation, SearchSpace, Unit

REACH = 4
"""Levels on either side of the incumbent."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round that follows another begins with; levels are those of its own space.

    Attributes:
        incumbent: What the round before chose, filled: where the search begins.
        uniform: The first round's uniform baseline.
        two_rate: The first round's best two-rate baseline.
        earlier: What each round before spent and reached, as ``result.json`` tells it.
    """

    incumbent: Allocation
    uniform: Allocation
    two_rate: Allocation
    earlier: tuple[Mapping[str, Any], ...]

    @property
    def number(self) -> int:
        """Which round this is, the first being 1."""
        return len(self.earlier) + 1

    def to_json(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """Read what :meth:`to_json` wrote."""
        named = {name: tuple(map(int, data[name])) for name in ("incumbent", "uniform", "two_rate")}
        return cls(**named, earlier=tuple(data["earlier"]))


def refine_ladders(
    space: SearchSpace, incumbent: Allocation, others: Sequence[Allocation]
) -> dict[str, tuple[float, ...]]:
    """Return the sparsities of the next round's levels beside dense, increasing, by unit.

    Args:
        space: What was searched.
        incumbent: Around which ladders are drawn.
        others: Allocations whose levels stay.
    """
    allocations = [incumbent, *others]
    return {
        unit.name: _ladder(unit, [allocation[index] for allocation in allocations])
        for index, unit in enumerate(space.units)
    }


def translate(allocation: Allocation, space: SearchSpace, finer: SearchSpace) -> Allocation:
    """Return the allocation of another space that keeps the same of every unit; its ladders must have those levels."""
    pairs = zip(space.units, finer.units, allocation, strict=True)
    return tuple(after.kept.index(before.kept[level]) for before, after, level in pairs)


def fill_budget(space: SearchSpace, allocation: Allocation, budget: Budget) -> Allocation:
    """Return an allocation within the budget with units made denser, in model order, where the budget has room."""
    return repair(space, allocation, budget, range(len(space.units)))


def _ladder(unit: Unit, levels: Sequence[int]) -> tuple[float, ...]:
    if unit.num_levels == 1:
        return ()
    # most gaps are of the present step; those beyond the reach of the incumbent are wider
    gap = median(before - after for before, after in pairwise(unit.kept))
    step = max(gap / 2, unit.num_groups) / unit.total
    centre, sparsest = unit.sparsity(levels[0]), unit.sparsity(unit.num_levels - 1)
    window = {centre + steps * step for steps in range(-REACH, REACH + 1) if steps}
    sparsities = {*window, *map(unit.sparsity, levels), sparsest}
    return tuple(sorted(sparsity for sparsity in sparsities if 0.0 < sparsity <= sparsest))
