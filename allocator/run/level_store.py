"""The level store of a run: where it is, whether it is there, and how it is built."""

from __future__ import annotations

from pathlib import Path

from allocator.core.files import fingerprint
from allocator.evaluation.spec import Evaluator
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.levels.store import LevelStore, StoreBuilder, check_free, open_store
from allocator.run.job import Job
from allocator.run.reporting import Reporter

STORE_FOLDER = "levels"
"""The folder of the level store inside a run's folder. The user may name another place."""


def locate_store(job: Job) -> Path:
    """Return the folder of the level store of a job's round.

    A run of one round uses the folder that the user named. A run of several rounds needs several stores. They lie next
    to that folder, and each name contains the hash of all that the store depends on. So runs share equal stores.
    """
    named = job.config.store
    if named is None:
        return job.config.folder / STORE_FOLDER
    if job.config.search.rounds == 1:
        return named
    return named.with_name(f"{named.name}-{fingerprint(job.store_key)[7:19]}")


def find_store(job: Job) -> LevelStore | None:
    """Return the finished level store of a job's round; None if it has to be built.

    Raises:
        UserError: The folder holds something else, or cannot be written to.
    """
    folder = locate_store(job)
    store = open_store(folder, job.store_key)
    if store is None:
        check_free(folder)
    return store


def build_store(job: Job, evaluator: Evaluator, reporter: Reporter) -> None:
    """Build the level store of a job's round, or the units that an unfinished store lacks."""
    reporter.start_phase(f"level store{name_round(job)}", len(job.layout.blocks))
    folder = locate_store(job)
    if open_store(folder, job.store_key) is not None:
        return  # another run has built it meanwhile
    builder = StoreBuilder(folder, job.store_key)
    if job.inputs == "dense":
        evaluator.build(builder, builder.missing(job.space), reporter.advance)
    else:
        calibration = job.engine_spec(None).calibration(job.tokens["calibration"], reporter.advance, reporter.notify)
        levels = prune_on_pruned_inputs(calibration, job.along, every_level=True, known=builder, solve=evaluator.solve)
        builder.fill(levels)
    builder.finish(unit.name for unit in job.space.units)


def name_round(job: Job) -> str:
    """Return the number of the round in words; empty for a search of one round."""
    rounds = job.config.search.rounds
    return f" {job.round_number}/{rounds}" if rounds > 1 else ""
