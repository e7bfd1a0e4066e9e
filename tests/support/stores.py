"""Level stores, made in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import LevelStore, StoreBuilder


def create_store(folder: Path, key: Mapping[str, Any], levels: Iterable[tuple[str, CompactLevels]]) -> LevelStore:
    """Write a store unit by unit, and return it."""
    builder = StoreBuilder(folder, key)
    return builder.finish(builder.fill(levels))
