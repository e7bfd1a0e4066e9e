"""Presets of exchange evolution: the numbers of three papers, for the patterns for which they publish some.

The module :mod:`~allocator.searchers.methods.evolution` says what they share and how exchanges and budgets differ here.
All begin at uniform. The local pruner and the engine are those of the run, not of the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocator.core.errors import UserError

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # Sieberling et al., ICML 2025, appendix: unstructured sparsity on 7 to 8 B models
    "evopress": {
        "unstructured": {
            "generations": 400,
            "patience": 400,
            "offspring": 64,
            "tokens": [2048, 16384, 65536],
            "survivors": [8, 2, 1],
            "max_exchanges": 3,
            "within_kind": False,
        }
    },
    # Tang et al., COLM 2026: exchanges as in EvoPress, within one type of module; training is a separate setting
    "darwinlm": {
        "structured": {
            "generations": 200,
            "patience": 200,
            "offspring": 16,
            "tokens": [1024, 2048, 4096, 8192],
            "survivors": [8, 4, 2, 1],
            "max_exchanges": 3,
            "within_kind": True,
        }
    },
    # Li et al., NeurIPS 2025: one coarse-to-fine iteration; the better of the last stage's two is the parent
    "tyr": {
        "structured": {
            "generations": 50,
            "patience": 50,
            "offspring": 128,
            "tokens": [2048, 16384, 131072],
            "survivors": [16, 4, 1],
            "max_exchanges": 4,
            "within_kind": True,
        }
    },
}
"""By name, then by pattern: settings of exchange evolution."""


def read_preset(name: str, pattern: str) -> dict[str, Any]:
    """Return the published settings of a method for a pattern.

    Raises:
        UserError: The paper publishes none for the pattern. The message names the presets that have some.
    """
    published = PRESETS[name]
    if pattern not in published:
        others = [other for other, patterns in PRESETS.items() if pattern in patterns]
        raise UserError(
            f"search.method: {name} publishes numbers for {', '.join(published)} pruning, and none for {pattern}. "
            f"Use {', '.join([*others, 'evolution'])}, or give the numbers yourself as search.evolution"
        )
    return dict(published[pattern])
