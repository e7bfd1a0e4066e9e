"""The folder of a run: begun whole, resumed where it stopped, and moved on from round to round.

The folder's own journal, front and level store are those of the round at hand; journals and fronts of earlier rounds
lie under ``rounds/<number>``. The header of a journal says what its round begins with, so resuming needs no other.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
from pathlib import Path

import torch

from allocator.core.errors import UserError
from allocator.core.files import check_place, fingerprint, write_atomic
from allocator.core.header import NUMERICS, JournalHeader
from allocator.core.journal import Journal
from allocator.model.live.walk import SEQUENCES_PER_BATCH
from allocator.pruning.levels.store import LevelStore, check_free, open_store
from allocator.run.job import Job, versions
from allocator.run.reporting import Reporter
from allocator.run.rounds import job_of_round

_STORE, _OUTDATED, _NEXT = "levels", ".levels.outdated", ".journal.next"


def check_folder(folder: Path, resume: bool) -> None:
    """Check that a run can begin in a folder, or be resumed.

    Raises:
        UserError: It holds a run already, or none, cannot be written to, or would be lost with a job.
    """
    if in_job() and not folder.is_absolute():
        raise UserError(
            f"{folder}: is relative to the job's working folder, and would be lost with it. "
            "Name a folder that all nodes share by its absolute path with --runs-dir"
        )
    if resume:
        if not (folder / "journal.jsonl").is_file():
            raise UserError(f"{folder}: no run of this name to resume. Leave out --resume to start it")
        return
    if folder.exists():
        raise UserError(f"{folder}: the run exists already. Continue it with --resume, or choose another --name")
    check_place(folder, "Choose another with --runs-dir")


def in_job() -> bool:
    """Whether this process is the command of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def begun(job: Job) -> Journal:
    """Make the folder of a job's run, and return its journal.

    Raises:
        UserError: Another process has made it meanwhile.
    """
    folder = job.config.folder
    partial = folder.with_name(f".{folder.name}~{socket.gethostname()}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_atomic(partial / "run.yaml", job.config.to_yaml())
        journal = Journal.create(partial / "journal.jsonl", _header(job))
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            raise UserError(
                f"{folder}: another process has begun this run meanwhile. Wait for it, or choose another --name"
            ) from None
        raise
    journal.path = folder / journal.path.name  # open and locked all the while
    for left in folder.parent.glob(f".{glob.escape(folder.name)}~*.partial"):  # by a kill, or by who came too late
        shutil.rmtree(left, ignore_errors=True)
    return journal


def resumed(job: Job, reporter: Reporter) -> tuple[Job, Journal]:
    """Return the job of the round in which a run stopped, and its journal; clear away what a kill may have left.

    Args:
        job: That of the first round.
        reporter: Hears what is known, and what has changed since.

    Raises:
        UserError: The folder holds another search, or its journal is damaged or in use.
    """
    folder = job.config.folder
    journal = Journal.resume(folder / "journal.jsonl")
    job = job_of_round(job, journal.header)
    for key, value in job.identity().items():
        if journal.header.identity.get(key) != value:
            journal.close()
            raise UserError(
                f"{folder}: holds another search: its {key} is {journal.header.identity.get(key)}, and this one's "
                f"is {value}. Resume it with its own settings ({folder / 'run.yaml'}), or choose another --name"
            )
    if journal.header.budget != job.budget:
        journal.close()
        raise UserError(
            f"{folder}: holds another search: its budget is {_limits(journal.header)}, and this one's is "
            f"{dict(job.budget.limits)}. Restore the latency table that it was begun with, or choose another --name"
        )
    now = _header(job)
    for key in NUMERICS:
        if getattr(journal.header, key) != getattr(now, key):
            reporter.say(f"notice: {folder} was begun with another {key}; the plan may differ by rounding")
    reporter.say(f"resuming {folder}: {len(journal)} measurements are known")
    for left in (*folder.glob(".executing-*"), folder / _OUTDATED):
        shutil.rmtree(left, ignore_errors=True)
    for left in (*folder.glob(".*.tmp"), folder / _NEXT):
        left.unlink(missing_ok=True)
    return job, journal


def advanced(job: Job) -> Journal:
    """Move a run on to a job's round, and return the journal of that round.

    The round before is over as soon as the journal is that of the next. A kill before that leaves a journal which
    answers all that its round asks. The level store goes, for it is of no more use and the next needs the room.
    The journal of the round before must still be open, so that there is no moment at which no journal is locked.
    """
    folder = job.config.folder
    archive = folder / "rounds" / str(job.round_number - 1)
    archive.mkdir(parents=True, exist_ok=True)
    write_atomic(archive / "journal.jsonl", (folder / "journal.jsonl").read_bytes())
    for path, to in ((folder / "front.json", archive / "front.json"), (folder / _STORE, folder / _OUTDATED)):
        if path.exists():
            path.rename(to)
    journal = Journal.create(folder / _NEXT, _header(job))
    journal.path = journal.path.rename(folder / "journal.jsonl")
    shutil.rmtree(folder / _OUTDATED, ignore_errors=True)
    return journal


def store_place(job: Job) -> Path:
    """Return where the level store of a job's round lies.

    A place that the user named is for runs of one round to share. Stores of several rounds lie beside it, named after
    what they belong to, and are shared by runs whose rounds have the same.
    """
    named = job.config.store
    if named is None:
        return job.config.folder / _STORE
    if job.config.search.rounds == 1:
        return named
    return named.with_name(f"{named.name}-{fingerprint(job.store_key)[7:19]}")


def find_store(job: Job) -> LevelStore | None:
    """Return the level store of a job's round, or None where there is none and one can be written.

    Raises:
        UserError: The place holds something else, or cannot be written to.
    """
    place = store_place(job)
    found = open_store(place, job.store_key)
    if found is None:
        check_free(place)
    return found


def _limits(header: JournalHeader) -> dict[str, int]:
    return {} if header.budget is None else dict(header.budget.limits)


def _header(job: Job) -> JournalHeader:
    config, cuda = job.config, job.config.device == "cuda"
    return JournalHeader(
        identity=job.identity(),
        model=job.model_id,
        pruner=job.pruner_id,
        asked=config.asked,
        method=config.search.method,
        seed=config.seed,
        loss=config.loss,
        objectives=config.objectives,
        tokens=config.search.settings_for_round(job.round_number).fidelities,
        selection=config.tokens.selection,
        workload=job.workload_id,
        training=job.training_id.get("training"),
        budget=job.budget,
        space=job.space,
        round=None if job.round is None else job.round.to_json(),
        device="cuda" if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        micro_batch=(SEQUENCES_PER_BATCH, config.tokens.sequence_length),
        versions=versions(),
    )
