"""Submitting: a search becomes a job of a Ray cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allocator.run.config.load import read_keys
from allocator.run.job_package import COMMAND, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """A job that was submitted.

    Attributes:
        job: The job's id on the cluster.
        run: The folder of its run.
        address: The cluster's dashboard, without secrets.
        size_bytes: What was sent.
        status: How the job ended, such as ``SUCCEEDED``; None if it was not followed.
    """

    job: str
    run: Path
    address: str
    size_bytes: int
    status: str | None = None


def submit(
    file: Path | str,
    *,
    address: str | None = None,
    name: str | None = None,
    runs_dir: Path | str | None = None,
    settings: Sequence[str] | None = None,
    installed: bool = False,
    follow: Callable[[str], None] | None = None,
    started: Callable[[SubmittedJob], None] | None = None,
) -> SubmittedJob:
    """Search as a job of a Ray cluster. A run that exists is resumed. Files with relative paths are sent along.

    Args:
        file: A run file.
        address: The cluster's dashboard. None for ``RAY_API_SERVER_ADDRESS``, or ``http://127.0.0.1:8265``.
        name: The name of the run.
        runs_dir: A folder of runs that all nodes share, absolute.
        settings: Other keys, such as ``["search.evolution.generations=10"]``.
        installed: Whether the cluster has this package, so that it is not sent.
        follow: Called with the lines of the job's log until the job ends. None to return at once.
        started: Called when the job is submitted.

    Raises:
        UserError: A key is wrong, a file is missing, all of it is too large, or the cluster cannot be reached.
    """
    from allocator.pool.jobs import JobServer

    file = Path(file)
    package = pack(read_keys(file, {"name": name, "runs_dir": runs_dir}, settings or ()), file, installed=installed)
    server, run = JobServer(address), package.config.folder
    server.check_idle(run)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "package.zip"
        package.write(archive)
        job = server.submit(run, COMMAND, archive, package.variables)
    submitted = SubmittedJob(job=job, run=run, address=server.public_address, size_bytes=package.size_bytes)
    if started is not None:
        started(submitted)
    if follow is None:
        return submitted
    status = server.follow(job, follow)
    return SubmittedJob(job=job, run=run, address=server.public_address, size_bytes=package.size_bytes, status=status)
