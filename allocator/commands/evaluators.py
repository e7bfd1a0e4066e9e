"""The evaluator of a configuration: in this process, or a pool of Ray workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from allocator.evaluation.local import LocalEvaluator
from allocator.evaluation.spec import EngineSpec, Evaluator
from allocator.model.data.examples import Examples
from allocator.run.config.run import RunConfig
from allocator.run.reporting import Reporter


@contextmanager
def connect(config: RunConfig, reporter: Reporter) -> Iterator[None]:
    """Keep a connection to the Ray cluster of a configuration's workers while the body runs. No workers, no cluster."""
    if config.workers == 0:
        yield
        return
    from allocator.pool.cluster import connected

    with connected(config.workers, _demand(config), config.address, reporter.notify):
        yield


@contextmanager
def open_evaluator(
    spec: EngineSpec, tokens: Mapping[str, Examples], config: RunConfig, reporter: Reporter
) -> Iterator[Evaluator]:
    """Yield the evaluator of a configuration, and close it at the end."""
    if config.workers == 0:
        yield LocalEvaluator(spec, tokens, reporter.notify)
        return
    from allocator.pool.dispatch import RayPool

    pool = RayPool(spec, tokens, config.workers, reporter.notify, _demand(config))
    try:
        yield pool
    finally:
        pool.close()


def _demand(config: RunConfig) -> Any:
    """Return what each worker takes of its node."""
    from allocator.pool.cluster import Demand

    gpus = 0.0 if config.device == "cpu" else config.worker.gpus
    return Demand(config.threads, gpus, config.worker.resources)
