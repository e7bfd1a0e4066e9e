"""Jobs on a Ray cluster: sent to it, and followed. Listing, logs and stopping are Ray's own commands."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from allocator.core.errors import UserError

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Variable that names a cluster where no address is given, as for Ray's own commands."""

_DEFAULT = "http://127.0.0.1:8265"
_RUN = "allocator.run"
_KNOCK_S = 10.0
_STOP_S = 60
_LOOK_S = 0.2


class JobServer:
    """Takes jobs at the address of a cluster's dashboard.

    Attributes:
        shown: The address, without what may be secret in it.
    """

    def __init__(self, address: str | None) -> None:
        """Connect.

        Raises:
            UserError: It is no address of a dashboard, nothing answers there, or a token is asked for.
        """
        url = address or os.environ.get(ADDRESS) or _DEFAULT
        url = (url if "://" in url else f"http://{url}").rstrip("/")
        parts = urlsplit(url)
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"address: jobs are sent to the dashboard, such as http://HEAD:8265; found {self.shown}")
        for talkative in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{talkative}").setLevel(logging.ERROR)
        try:
            requests.get(f"{url}/api/version", timeout=_KNOCK_S).close()  # Ray itself would wait for ever
            with _without_addresses():
                self._client = JobSubmissionClient(url)
        except RayError:  # of authentication, which older versions have no name for
            raise UserError(
                f"address: the cluster at {self.shown} asks for a token. Set RAY_AUTH_MODE=token, and put the "
                "cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        except (requests.RequestException, ConnectionError, RuntimeError, ValueError, KeyError) as error:
            # errors of Ray name the address in full
            raise UserError(
                f"address: no Ray dashboard answers at {self.shown} ({type(error).__name__}). Start a cluster with "
                "'ray start --head', or name the one that runs with --address http://HEAD:8265"
            ) from None

    def check_idle(self, run: Path) -> None:
        """Check that no job of a run is waiting or running here.

        Raises:
            UserError: One is.
        """
        for job in self._jobs():
            if not job.status.is_terminal() and (job.metadata or {}).get(_RUN) == str(run):
                raise UserError(
                    f"{run}: the job {job.submission_id} is on this run. Follow it with "
                    f"'ray job logs --follow --address {self.shown} {job.submission_id}', or stop it with "
                    f"'ray job stop --address {self.shown} {job.submission_id}' and submit again"
                )

    def submit(self, run: Path, entrypoint: str, package: Path, variables: Mapping[str, str]) -> str:
        """Send a job on a run, and return its id: the name of the run, and how many jobs on it there were with this.

        Args:
            run: The folder of the run.
            entrypoint: The command.
            package: Zip file of the working folder.
            variables: Of the environment, of the command and of its workers.

        Raises:
            UserError: The cluster does not take it.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name)
        taken = {job.submission_id for job in self._jobs()}
        number = next(n for n in range(1, len(taken) + 2) if f"{name}-{n}" not in taken)
        # Ray kills what has not ended three seconds after it was stopped
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), **variables}
        try:
            return self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{name}-{number}",
                runtime_env={"working_dir": str(package), "env_vars": environment},
                metadata={_RUN: str(run)},
            )
        except (requests.RequestException, RuntimeError) as error:
            raise self._failed(error) from None

    def follow(self, job: str, write: Callable[[str], object]) -> JobStatus:
        """Write the log of a job as it grows, and return how it ended.

        Raises:
            UserError: The connection broke.
        """
        try:
            return asyncio.run(self._followed(job, write))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise UserError(
                f"address: the connection to {self.shown} broke ({type(error).__name__}), and {job} may go on. Follow "
                f"it again with 'ray job logs --follow --address {self.shown} {job}'"
            ) from None

    def _jobs(self) -> list[JobDetails]:
        try:
            return list(self._client.list_jobs())
        except (requests.RequestException, RuntimeError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> UserError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        said = reason.replace(self._client.get_address(), self.shown)
        return UserError(f"address: {self.shown} did not take the job ({said}). Submit it again")

    async def _followed(self, job: str, write: Callable[[str], object]) -> JobStatus:
        async for lines in self._client.tail_job_logs(job):
            write(lines)
        while not (status := self._client.get_job_status(job)).is_terminal():
            await asyncio.sleep(_LOOK_S)
        return status


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Hide what Ray would take in place of the address that it is given."""
    hidden = {name: os.environ.pop(name) for name in (ADDRESS, "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
