"""Actors that do no work, and whatever else befalls a worker. No torch is imported."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import ray


@ray.remote(num_cpus=0.5, max_restarts=0)
class Toy:
    def __init__(self, hardware: str = "toy") -> None:
        self._hardware = hardware

    def ready(self) -> str:
        return self._hardware

    def renew(self) -> None:
        pass

    def double(self, number: int, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        return 2 * number

    def once_slow(self, number: int, seconds: float, mark: Path) -> int:
        """Be slow the first time."""
        first = not mark.exists()
        with mark.open("a") as file:
            file.write("called")
        if first:
            time.sleep(seconds)
        return 2 * number

    def stop(self, number: int, mark: Path) -> int:
        """Hang the first time, as a process that was stopped does."""
        if not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return 2 * number

    def fail(self) -> None:
        raise ValueError("as told")

    def fill(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/dev/full")

    def pid(self) -> int:
        return os.getpid()
