"""How training changed the losses of a search, and whether it changed their order."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from allocator.core.journal import Journal
from allocator.core.protocols import Fidelity


def summarise_training(journal: Journal) -> list[dict[str, Any]]:
    """Summarise the effect of training by split and fidelity, in the order in which they first appear.

    Returns:
        For each: ``split``, ``tokens``, ``training`` (tokens) and ``evaluations``; the mean losses ``before`` and
        ``after``; and Spearman's rank correlation of the two. ``rank_correlation`` is over the whole search.
        ``rank_correlation_in_batch`` is the mean over batches of three or more, because a search chooses within a
        batch. Both are None where they are not defined.
    """
    groups: dict[Fidelity, list[list[tuple[float, float]]]] = {}
    for batch in journal.batches:
        batch_pairs: dict[Fidelity, list[tuple[float, float]]] = {}
        for outcome in batch:
            if outcome.loss_before is not None:
                batch_pairs.setdefault(outcome.request.fidelity, []).append((outcome.loss_before, outcome.loss))
        for fidelity, pairs in batch_pairs.items():
            groups.setdefault(fidelity, []).append(pairs)
    lines = []
    for (split, tokens, training, _), batches in groups.items():
        pairs = [pair for batch in batches for pair in batch]
        in_batch = [rank for batch in batches if (rank := _rank_correlation(batch)) is not None]
        lines.append(
            {
                "split": split,
                "tokens": tokens,
                "training": training,
                "evaluations": len(pairs),
                "before": fmean(before for before, _ in pairs),
                "after": fmean(after for _, after in pairs),
                "rank_correlation": _rank_correlation(pairs),
                "rank_correlation_in_batch": fmean(in_batch) if in_batch else None,
            }
        )
    return lines


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three pairs, or where one side is constant."""
    from scipy.stats import spearmanr

    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
