"""Coarse to fine: after a search, new ladders of half the step are made around the chosen allocation.

After Týr-the-Pruner (NeurIPS 2025). Each unit gets nine levels around its present sparsity, and the step is halved from
round to round. Units are pruned again from dense weights, on the expected outputs of their predecessors over those
levels, and the levels are searched. This differs from the paper in seven ways:

- By default, units are pruned side by side on dense inputs in all rounds but the last. Rounds may also follow the
  incumbent's path in place of the expectation. Then weights are made for the incumbent, and all other allocations seem
  worse.
- All rounds but the last only find where finer ladders belong. They select nothing on text of its own, and ``auto``
  ends after its trust region.
- Every ladder keeps its dense and its sparsest level, so a whole sub-block may be removed or restored in any round.
- Ladders keep the levels of the baselines, so the baselines do not change and are measured in every round.
- Costs are exact and trade across kinds. Where finer levels leave room, the incumbent is filled up to the budget.
- A step is at least one item, so ladders of few items keep every count.
- Any method may search, and the incumbent competes on the selection split with the allocations that it finds.
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
"""Levels on each side of the incumbent."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a later round begins with; levels are those of its own space.

    Attributes:
        incumbent: The choice of the round before, filled: where the search begins.
        uniform: The first round's uniform baseline.
        two_rate: The first round's best two-rate baseline.
        earlier: What each round before spent and reached, as in ``result.json``.
    """

    incumbent: Allocation
    uniform: Allocation
    two_rate: Allocation
    earlier: tuple[Mapping[str, Any], ...]

    @property
    def number(self) -> int:
        """Which round this is; the first is 1."""
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
    """Return the sparsities of the next round's levels without the dense one, increasing, by unit.

    Args:
        space: The space of this round.
        incumbent: The allocation around which ladders are made.
        others: Allocations whose levels are kept.
    """
    allocations = [incumbent, *others]
    return {
        unit.name: _ladder(unit, [allocation[index] for allocation in allocations])
        for index, unit in enumerate(space.units)
    }


def translate(allocation: Allocation, space: SearchSpace, finer: SearchSpace) -> Allocation:
    """Return the same allocation in the levels of another space, whose ladders must have the same counts."""
    pairs = zip(space.units, finer.units, allocation, strict=True)
    return tuple(after.kept.index(before.kept[level]) for before, after, level in pairs)


def fill_budget(space: SearchSpace, allocation: Allocation, budget: Budget) -> Allocation:
    """Make units of an allocation denser, in model order, until the budget is full."""
    return repair(space, allocation, budget, range(len(space.units)))


def _ladder(unit: Unit, levels: Sequence[int]) -> tuple[float, ...]:
    if unit.num_levels == 1:
        return ()
    # most gaps are of the present step; gaps beyond the reach of the incumbent are wider
    gap = median(before - after for before, after in pairwise(unit.kept))
    step = max(gap / 2, unit.num_groups) / unit.total
    centre, sparsest = unit.sparsity(levels[0]), unit.sparsity(unit.num_levels - 1)
    window = {centre + steps * step for steps in range(-REACH, REACH + 1) if steps}
    sparsities = {*window, *map(unit.sparsity, levels), sparsest}
    return tuple(sorted(sparsity for sparsity in sparsities if 0.0 < sparsity <= sparsest))
