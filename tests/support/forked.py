"""Commands and scripts in processes of their own that start at once: forked from one that has imported what they need.

A command that is started with ``python -m allocator`` imports torch and transformers anew, which takes seconds. What is
tested of such a process (its exit code, its session, signals, kills) is the same here.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

_PRELOADED = ["allocator.commands.search", "allocator.evaluation.engine", "transformers.models.llama.modeling_llama"]


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _command(program: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Run a command as ``python -m allocator`` does, a script, or some code."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    # as in a terminal; a shell in the background starts what it starts with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [program, *arguments]
    try:
        if program == "allocator":
            importlib.import_module("allocator.cli").main()
        elif program == "-c":
            code = sys.argv.pop(1)
            exec(code, {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(program).resolve().parent))
            runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def without_cluster() -> dict[str, str]:
    """Return this environment without the variables that name a Ray cluster. Ray's own settings stay."""
    return {key: value for key, value in os.environ.items() if not (key.startswith("RAY_") and key.isupper())}


class Command:
    """A command of this package, in a session of its own; it looks like a :class:`subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        program: object = "allocator",
    ) -> None:
        logs = tempfile.mkdtemp(prefix="command")
        self._out, self._err = Path(logs, "out"), Path(logs, "err")
        for log in (self._out, self._err):
            log.touch()
        given = (str(program), list(map(str, arguments)), str(folder or Path.cwd()), dict(environment or os.environ))
        self._process = _context().Process(target=_command, args=(*given, str(self._out), str(self._err)))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process, and its session."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of :class:`subprocess.Popen`, up to date at any time."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"still running after {timeout} s")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended, and return what it wrote."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class Python(Command):
    """What Python runs: ``Python(["script.py", *arguments])`` or ``Python(["-c", code])``."""

    def __init__(
        self, arguments: Sequence[object], folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        program, *rest = arguments
        super().__init__(rest, folder, environment, program)
