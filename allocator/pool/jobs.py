"""Jobs on a Ray cluster: how they are sent and followed. Use Ray's own commands to list, read and stop them."""

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
"""Environment variable that names the cluster where no address is given, as for Ray's own commands."""

_DEFAULT = "http://127.0.0.1:8265"
_RUN = "allocator.run"
_CONNECT_S = 10.0
_STOP_S = 60
_POLL_S = 0.2


class JobServer:
    """The dashboard of a cluster, which takes jobs.

    Attributes:
        public_address: The address without its secret parts.
    """

    def __init__(self, address: str | None) -> None:
        """Connect.

        Raises:
            UserError: The address is not a dashboard's, nothing answers there, or the cluster requires a token.
        """
        url = address or os.environ.get(ADDRESS) or _DEFAULT
        url = (url if "://" in url else f"http://{url}").rstrip("/")
        parts = urlsplit(url)
        self.public_address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"address: jobs are sent to the dashboard, such as http://HEAD:8265; found {self.public_address}"
            )
        for talkative in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{talkative}").setLevel(logging.ERROR)
        try:
            requests.get(f"{url}/api/version", timeout=_CONNECT_S).close()  # Ray itself would wait forever
            with _hidden_addresses():
                self._client = JobSubmissionClient(url)
        except RayError:  # an authentication error; older versions of Ray have no class for it
            raise UserError(
                f"address: the cluster at {self.public_address} asks for a token. Set RAY_AUTH_MODE=token, and put the "
                "cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        except (requests.RequestException, ConnectionError, RuntimeError, ValueError, KeyError) as error:
            # Ray's own errors contain the full address
            raise UserError(
                f"address: no Ray dashboard answers at {self.public_address} ({type(error).__name__}). Start a cluster "
                "with 'ray start --head', or name the one that runs with --address http://HEAD:8265"
            ) from None

    def check_idle(self, run: Path) -> None:
        """Check that no job of a run is waiting or running on this cluster.

        Raises:
            UserError: There is one.
        """
        for job in self._jobs():
            if not job.status.is_terminal() and (job.metadata or {}).get(_RUN) == str(run):
                raise UserError(
                    f"{run}: the job {job.submission_id} is on this run. Follow it with "
                    f"'ray job logs --follow --address {self.public_address} {job.submission_id}', or stop it with "
                    f"'ray job stop --address {self.public_address} {job.submission_id}' and submit again"
                )

    def submit(self, run: Path, entrypoint: str, package: Path, variables: Mapping[str, str]) -> str:
        """Send a job for a run, and return its id: the name of the run and a number that counts the jobs for it.

        Args:
            run: The folder of the run.
            entrypoint: The command.
            package: Zip file of the working folder.
            variables: Environment variables of the command and its workers.

        Raises:
            UserError: The cluster does not take the job.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name)
        taken = {job.submission_id for job in self._jobs()}
        number = next(n for n in range(1, len(taken) + 2) if f"{name}-{n}" not in taken)
        # by default Ray kills a job three seconds after it was told to stop
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), **variables}
        try:
            return self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{name}-{number}",
                runtime_env={"working_dir": str(package), "env_vars": environment},
                metadata={_RUN: str(run)},
            )
        except (requests.RequestException, RuntimeError) as error:
            raise self._submission_error(error) from None

    def follow(self, job: str, write: Callable[[str], object]) -> JobStatus:
        """Write the log of a job as it grows, and return how it ended.

        Raises:
            UserError: The connection broke.
        """
        try:
            return asyncio.run(self._write_log(job, write))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise UserError(
                f"address: the connection to {self.public_address} broke ({type(error).__name__}), but {job} may "
                f"still run. Follow it again with 'ray job logs --follow --address {self.public_address} {job}'"
            ) from None

    def _jobs(self) -> list[JobDetails]:
        try:
            return list(self._client.list_jobs())
        except (requests.RequestException, RuntimeError) as error:
            raise self._submission_error(error) from None

    def _submission_error(self, error: Exception) -> UserError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        reason = reason.replace(self._client.get_address(), self.public_address)
        return UserError(f"address: {self.public_address} did not take the job ({reason}). Submit it again")

    async def _write_log(self, job: str, write: Callable[[str], object]) -> JobStatus:
        async for lines in self._client.tail_job_logs(job):
            write(lines)
        while not (status := self._client.get_job_status(job)).is_terminal():
            await asyncio.sleep(_POLL_S)
        return status


@contextmanager
def _hidden_addresses() -> Iterator[None]:
    """Hide the environment variables that Ray prefers to the address that it is given."""
    hidden = {name: os.environ.pop(name) for name in (ADDRESS, "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
