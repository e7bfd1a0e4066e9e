"""Stopping: a run that the user or the end of a job stops says how to continue it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from allocator.run.config.run import RunConfig


@contextmanager
def explain_stop(config: RunConfig, verb: str, asked: str = "") -> Iterator[None]:
    """Exit with code 130 if the user, or the end of a job, stops the body, and say how to continue.

    Args:
        config: The run.
        verb: The command.
        asked: Flags of the command that no run file holds.
    """
    from allocator.run.directory import in_job

    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does, but from the start
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        where = f" --runs-dir {config.runs_dir}" if config.runs_dir != Path("runs") else ""
        at = " --address ADDRESS" if config.address is not None else ""
        again = f"Continue with:\n  allocator {verb} --resume --name {config.run_name}{where}{at}{asked}"
        if in_job():
            again = "Submit it again to continue"
        begun = (config.folder / "journal.jsonl").exists()
        print(f"\nstopped; {f'nothing measured is lost. {again}' if begun else 'nothing was begun'}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
