"""How a batch of requests is cut into runs, one for each call of a worker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.core.protocols import Request


def estimate_size(run: Sequence[Request], blocks: int) -> float:
    """Estimate the work of a run, in tokens through all of a model's blocks.

    Leading units that equal those of the previous allocation cost nothing. The estimate is cheap and rough; what an
    allocation is charged with is :func:`~allocator.core.effort.candidate_tokens`.
    """
    levels_nu = np.array([request.allocation for request in run])
    shared_n = [0.0, *np.cumprod(levels_nu[1:] == levels_nu[:-1], axis=1).mean(axis=1).tolist()]
    parts = (max((r.blocks or blocks) / blocks - share, 0.0) for r, share in zip(run, shared_n, strict=True))
    return sum(r.tokens * part + 4 * r.training for r, part in zip(run, parts, strict=True)) + 1.0


def cut_runs(requests: Sequence[Request], workers: int) -> list[list[Request]]:
    """Cut requests into runs of decreasing length, after sorting so that neighbours share work.

    Half of the requests make one run per worker, half of the rest likewise, and so on (factoring: Hummel, Schonberg
    and Flynn, CACM 1992). Long runs share most work. Short runs at the end leave no worker idle while another is busy
    with a long one.
    """
    ordered = sorted(requests, key=lambda r: (r.split, r.tokens, r.probe, r.allocation, r.blocks))
    runs: list[list[Request]] = []
    start = 0
    while start < len(ordered):
        length = -(-(len(ordered) - start) // (2 * workers))
        for _ in range(workers):
            if start < len(ordered):
                runs.append(ordered[start : start + length])
                start += length
    return runs
