"""The folder of a run: it is created whole, reopened where the run stopped, and moved on from round to round.

The journal, front and level store in the folder belong to the present round. Those of earlier rounds are in
``rounds/<number>``. The header of a journal holds all that its round begins with: a resume needs no other file.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
from pathlib import Path

from allocator.core.errors import UserError
from allocator.core.files import check_place, write_atomic
from allocator.core.header import NUMERICS, JournalHeader
from allocator.core.journal import Journal
from allocator.pruning.pruners.registry import PRUNERS
from allocator.run.job import Job
from allocator.run.level_store import STORE_FOLDER
from allocator.run.reporting import Reporter
from allocator.run.rounds import restore_round

_OUTDATED, _NEXT = ".levels.outdated", ".journal.next"


def check_folder(folder: Path, resume: bool) -> None:
    """Check that a run can be created in a folder, or resumed.

    Raises:
        UserError: The folder holds a run already, holds none to resume, cannot be written to, or is relative in a job.
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


def create_run(job: Job) -> Journal:
    """Create the folder of a run, and return its journal.

    Raises:
        UserError: Another process has created it meanwhile.
    """
    folder = job.config.folder
    partial = folder.with_name(f".{folder.name}~{socket.gethostname()}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_atomic(partial / "run.yaml", job.config.to_yaml())
        journal = Journal.create(partial / "journal.jsonl", job.make_header())
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            raise UserError(
                f"{folder}: another process has begun this run meanwhile. Wait for it, or choose another --name"
            ) from None
        raise
    journal.path = folder / journal.path.name  # open and locked all the while
    for left in folder.parent.glob(
        f".{glob.escape(folder.name)}~*.partial"
    ):  # left by a kill, or by a process that came too late
        shutil.rmtree(left, ignore_errors=True)
    return journal


def reopen_run(job: Job, reporter: Reporter) -> tuple[Job, Journal]:
    """Return the job and the journal of the round in which a run stopped. Remove what a kill may have left.

    Args:
        job: The job of the first round.
        reporter: Called with what is known and with what has changed since.

    Raises:
        UserError: The folder holds another search, or its journal is damaged or in use.
    """
    folder = job.config.folder
    journal = Journal.resume(folder / "journal.jsonl")
    job = restore_round(job, journal.header)
    for key, value in job.identity().items():
        if journal.header.identity.get(key) != value:
            journal.close()
            found = journal.header.identity.get(key)
            raise UserError(
                f"{folder}: holds another search: its {key} is {found}, and this one's is {value}. "
                f"{_name_remedy(key, found, folder)}, or choose another --name"
            )
    if journal.header.budget != job.budget:
        journal.close()
        raise UserError(
            f"{folder}: holds another search: its budget is {_list_limits(journal.header)}, and this one's is "
            f"{dict(job.budget.limits)}. Restore the latency table that it was begun with, or choose another --name"
        )
    now = job.make_header()
    for key in NUMERICS:
        if getattr(journal.header, key) != getattr(now, key):
            reporter.notify(f"notice: {folder} was begun with another {key}; the plan may differ by rounding")
    reporter.notify(f"resuming {folder}: {len(journal)} measurements are known")
    for left in (*folder.glob(".executing-*"), folder / _OUTDATED):
        shutil.rmtree(left, ignore_errors=True)
    for left in (*folder.glob(".*.tmp"), folder / _NEXT):
        left.unlink(missing_ok=True)
    return job, journal


def start_next_round(job: Job) -> Journal:
    """Move a run on to the round of a job, and return the journal of that round.

    The previous round ends when the new journal takes the place of the old one. A kill before that moment leaves a
    journal that answers all requests of its round. The level store is removed, because the next round needs the room.
    The previous journal must still be open, so that one journal is locked at every moment.
    """
    folder = job.config.folder
    archive = folder / "rounds" / str(job.round_number - 1)
    archive.mkdir(parents=True, exist_ok=True)
    write_atomic(archive / "journal.jsonl", (folder / "journal.jsonl").read_bytes())
    for path, to in ((folder / "front.json", archive / "front.json"), (folder / STORE_FOLDER, folder / _OUTDATED)):
        if path.exists():
            path.rename(to)
    journal = Journal.create(folder / _NEXT, job.make_header())
    journal.path = journal.path.rename(folder / "journal.jsonl")
    shutil.rmtree(folder / _OUTDATED, ignore_errors=True)
    return journal


def _name_remedy(key: str, found: object, folder: Path) -> str:
    """Return how a run is resumed that differs in one key of its identity."""
    if key == "searcher":
        return "Pass its own searcher, as allocator.search(searcher=...)"
    if key == "pruner.name" and found not in PRUNERS:
        return "Pass its own pruner, as allocator.search(pruner=...)"
    return f"Resume it with its own settings ({folder / 'run.yaml'})"


def _list_limits(header: JournalHeader) -> dict[str, int]:
    return {} if header.budget is None else dict(header.budget.limits)
