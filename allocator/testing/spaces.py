"""Search spaces without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from allocator.core.space import SearchSpace, Unit


def make_space(
    ladders: Sequence[Sequence[int]], fixed: int = 1000, parts: Sequence[str] = ("attention", "mlp")
) -> SearchSpace:
    """Return a space from the parameters of each unit's levels.

    Args:
        ladders: Parameters of each level of each unit, falling.
        fixed: Parameters outside of units.
        parts: Parts of the units of one block, in turn.
    """
    units = tuple(
        Unit(
            name=f"layers.{index // len(parts)}.{parts[index % len(parts)]}",
            kind="channels",
            part=parts[index % len(parts)],
            block=index // len(parts),
            total=len(params) - 1 or 1,
            kept=tuple(range(len(params) - 1 or 1, (len(params) - 1 or 1) - len(params), -1)),
            params=tuple(params),
            macs=tuple(3 * count for count in params),
        )
        for index, params in enumerate(ladders)
    )
    return SearchSpace("structured", units, {"params": fixed, "macs": fixed})


def make_six_units() -> SearchSpace:
    """Return six units in three blocks, with ladders of unequal lengths and steps."""
    return make_space(
        [[60, 45, 30, 15, 0], [176, 154, 110, 99, 33, 0], [60, 30, 0], [170, 90, 7], [52, 39, 26, 0], [88, 0]]
    )


def draw_spaces() -> st.SearchStrategy[SearchSpace]:
    """Return a strategy of spaces: one to six units, one to five levels, steps of any size."""
    ladder = st.lists(st.integers(0, 400), min_size=1, max_size=5, unique=True).map(lambda v: sorted(v, reverse=True))
    return st.builds(make_space, st.lists(ladder, min_size=1, max_size=6), st.integers(0, 50))


def make_even_space(seed: int, num_units: int = 48, num_levels: int = 9) -> SearchSpace:
    """Return a space of equally spaced ladders whose units are of unequal size."""
    rng = np.random.default_rng([seed, 0])
    kept = tuple(range(num_levels - 1, -1, -1))
    return _of_channels([(kept, int(rng.choice([30, 40, 60, 90]))) for _ in range(num_units)])


def make_uneven_space(seed: int, num_units: int = 48, num_levels: int = 9) -> SearchSpace:
    """Return a space of units of unequal size, whose ladders have unequal steps and lengths."""
    rng = np.random.default_rng([seed, 4])
    ladders = []
    for _ in range(num_units):
        total, step = 2 * num_levels, int(rng.choice([10, 20, 30, 50]))
        length = int(rng.integers(max(2, num_levels - 2), num_levels + 1))
        between = np.sort(rng.choice(np.arange(1, total), length - 2, replace=False))[::-1]
        ladders.append(((total, *between.tolist(), 0), step))
    return _of_channels(ladders)


def _of_channels(ladders: Sequence[tuple[tuple[int, ...], int]]) -> SearchSpace:
    """Return a space from the kept channels of each unit's levels, and the parameters of one channel."""
    units = []
    for index, (kept, step) in enumerate(ladders):
        params, part = tuple(step * count for count in kept), ("attention", "mlp")[index % 2]
        units.append(
            Unit(
                name=f"blocks.{index // 2}.{part}",
                kind="channels",
                part=part,
                block=index // 2,
                total=kept[0],
                kept=kept,
                params=params,
                macs=params,
            )
        )
    return SearchSpace("structured", tuple(units), {"params": 500, "macs": 500})
