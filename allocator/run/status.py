"""How a run is, seen from outside: what it last wrote of itself, and whether it is still there."""

from __future__ import annotations

import fcntl
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from allocator.core.errors import UserError
from allocator.core.files import read_json
from allocator.run.recorder import BEAT_S, NAME, SCHEMA, machine

_SILENT_S = 6 * BEAT_S


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of ``status.json``, with its age in seconds as ``age_s`` and the true ``state``.

    A process that was killed says nothing of it: a run that seems to be running is ``lost`` where no process has its
    journal's lock; of one on another machine, whose locks may not be seen here, where nothing was heard for a minute.

    Raises:
        UserError: There is no status, or it cannot be read.
    """
    path = run / NAME
    if not run.exists():
        raise UserError(
            f"{run}: no such run. A job makes it once it has started, within a minute or so of 'allocator submit'; "
            "'ray job list' has the jobs, and 'ray job logs' what they say"
        )
    if not path.is_file() and (run / "journal.jsonl").is_file():
        raise UserError(f"{path}: no such file. The run is from before there was one; see 'allocator front {run}'")
    status = read_json(path, "status of a run")
    try:
        updated = datetime.fromisoformat(status["updated"])
        age_s = (datetime.now(timezone.utc) - updated).total_seconds()
        if status["kind"] != "allocator.status" or status["schema"] != SCHEMA:
            raise ValueError("another kind or schema")
        state, here = status["state"], status["machine"] == machine()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a status of schema {SCHEMA} ({type(error).__name__}: {error}). Resume the run"
        ) from None
    if state == "running" and not _locked(run / "journal.jsonl") and (here or age_s > _SILENT_S):
        state = "lost"
    return {**status, "state": state, "age_s": round(max(0.0, age_s), 1)}


def _locked(journal: Path) -> bool:
    """Whether a process is writing a journal, as far as the file system tells."""
    try:
        with journal.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
