"""The append-only record of a run: a header, then one JSON line per measured outcome.

The journal is the truth, and the state of a search follows from it: a searcher that is rebuilt and whose requests are
answered from the journal continues where the run stopped. There is one writer, the driver, which holds a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, get_args

from allocator.core.budget import fits
from allocator.core.errors import UserError
from allocator.core.files import canonical_json
from allocator.core.header import JournalHeader
from allocator.core.protocols import BEFORE, FEATURES, Expansion, Key, Outcome, Probe, Request
from allocator.core.space import Allocation, SearchSpace

SCHEMA = 3

_LOOK_S = 0.5
"""A writer holds its lock for longer than this; a process that only tests the lock does not."""


class Journal:
    """Outcomes by request, kept on disk. Open with :meth:`create`, :meth:`resume` or :meth:`read`.

    Attributes:
        header: The run's space, versions and fingerprints: everything on which outcomes depend.
    """

    def __init__(
        self, path: Path, header: JournalHeader, batches: Mapping[int, Sequence[Outcome]], file: BinaryIO | None
    ) -> None:
        self.path = path
        self.header = header
        self._outcomes: dict[Key, Outcome] = {}
        self._batches: dict[int, list[Key]] = {}
        self._file = file
        for batch, outcomes in batches.items():
            for outcome in outcomes:
                self._remember(outcome, batch)

    @classmethod
    def create(cls, path: Path, header: JournalHeader) -> Journal:
        """Create a journal at a path where no file exists."""
        file = path.open("xb")
        _lock(file, path)
        journal = cls(path, header, {}, file)
        journal._write({"schema": SCHEMA, "kind": "allocator.journal", **header.to_json()})
        journal.sync()
        return journal

    @classmethod
    def resume(cls, path: Path) -> Journal:
        """Open a journal for appending, and cut off a line that a crash left incomplete.

        Raises:
            UserError: The file is missing, damaged, or in use by another process.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such journal; nothing to resume")
        file = path.open("r+b")
        try:
            _lock(file, path)
            whole = file.read()
            header, batches = _parse(path, whole)
            file.seek(whole.rfind(b"\n") + 1)
            file.truncate()
        except BaseException:
            file.close()
            raise
        return cls(path, header, batches, file)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Open a journal for reading only, also while a run is writing it."""
        if not path.is_file():
            raise UserError(f"{path}: no such journal. Name the folder of a run")
        header, batches = _parse(path, path.read_bytes())
        return cls(path, header, batches, None)

    @property
    def loss(self) -> str:
        """The measurement that the run minimises."""
        return self.header.loss

    @property
    def space(self) -> SearchSpace:
        """The search space that the run searched."""
        return self.header.space

    def admits(self, allocation: Allocation) -> bool:
        """Whether an allocation may be a member of the run's front. If a front is searched, it must keep the budget."""
        if not self.header.objectives or self.header.budget is None:
            return True
        return fits(self.space, allocation, self.header.budget)

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[Outcome]:
        """Yield the outcomes that did not fail; :attr:`batches` has the others too."""
        return (outcome for outcome in self._outcomes.values() if not outcome.failed)

    def get(self, request: Request) -> Outcome | None:
        """Return the recorded outcome of a request, failed or not; None if there is none."""
        return self._outcomes.get(request.key)

    def measured(self, request: Request) -> Outcome | None:
        """Return the outcome of a request; None if there is none or it failed."""
        outcome = self.get(request)
        return None if outcome is None or outcome.failed else outcome

    def append(self, outcome: Outcome, batch: int = 0) -> None:
        """Record an outcome. It is flushed to the system at once, and to the disk by :meth:`sync`.

        Args:
            outcome: The outcome.
            batch: Number of the batch that requested it.
        """
        self._remember(outcome, batch)
        request = outcome.request
        self._write(
            {
                "batch": batch,
                "allocation": list(request.allocation),
                "split": request.split,
                "tokens": request.tokens,
                **({"training": request.training} if request.training else {}),
                **({"also": request.probe} if request.probe else {}),
                **({"blocks": request.blocks} if request.blocks else {}),
                "measured": dict(outcome.measured),
                "parts": list(outcome.sequence_losses),
                **({"failed": outcome.failed} if outcome.failed else {}),
                **({"expansion": asdict(outcome.expansion)} if outcome.expansion else {}),
                "wall_s": round(outcome.wall_s, 4),
            }
        )

    @property
    def batches(self) -> list[list[Outcome]]:
        """Outcomes by batch, failures included. The outcomes of one batch share computation."""
        return [[self._outcomes[key] for key in batch] for _, batch in sorted(self._batches.items())]

    def sync(self) -> None:
        """Force appended lines to the disk. Called once per batch."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force appended lines to the disk, and release the file and its lock."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file.fileno())
            finally:
                file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remember(self, outcome: Outcome, batch: int) -> None:
        if outcome.request.key not in self._outcomes:
            self._batches.setdefault(batch, []).append(outcome.request.key)
        self._outcomes[outcome.request.key] = outcome

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "opened for reading"
        self._file.write(canonical_json(line).encode() + b"\n")
        self._file.flush()


def _lock(file: BinaryIO, path: Path) -> None:
    end_s = time.monotonic() + _LOOK_S
    while not _locked(file, path):
        if time.monotonic() > end_s:
            raise UserError(f"{path}: another process is writing this run. Wait for it or stop it")
        time.sleep(_LOOK_S / 20)


def _locked(file: BinaryIO, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the last holder may have replaced the file by the journal of the next round
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _parse(path: Path, data: bytes) -> tuple[JournalHeader, dict[int, list[Outcome]]]:
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    header: JournalHeader | None = None
    batches: dict[int, list[Outcome]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if header is None:
                if entry["kind"] != "allocator.journal" or entry["schema"] != SCHEMA:
                    raise ValueError("not the header of a journal of this version")
                header = JournalHeader.from_json(entry)
                ladders = [unit.num_levels for unit in header.space.units]
                minimised = header.loss
                continue
            allocation = tuple(int(level) for level in entry["allocation"])
            if len(allocation) != len(ladders):
                raise ValueError(f"{len(allocation)} levels for {len(ladders)} units")
            if not all(0 <= level < length for level, length in zip(allocation, ladders, strict=True)):
                raise ValueError("a level outside its unit's ladder")
            training, probe = int(entry.get("training", 0)), entry.get("also", "")
            if probe not in get_args(Probe):
                raise ValueError(f"unknown probe {probe!r}")
            blocks = int(entry.get("blocks", 0))
            request = Request(
                allocation=allocation,
                tokens=int(entry["tokens"]),
                split=str(entry["split"]),
                training=training,
                probe=probe,
                blocks=blocks,
            )
            loss = FEATURES if blocks else minimised
            measured = {str(name): float(value) for name, value in entry["measured"].items()}
            failed = str(entry.get("failed", ""))
            if loss not in measured and not failed:
                raise ValueError(f"no {loss} was measured")
            if training and f"{loss}{BEFORE}" not in measured and not failed:
                raise ValueError(f"no {loss} was measured before training")
            parts = tuple(float(part) for part in entry.get("parts", ()))
            expansion = _expansion(entry["expansion"], ladders) if "expansion" in entry else None
            outcome = Outcome(
                request=request,
                measured=measured,
                wall_s=float(entry["wall_s"]),
                loss_name=loss,
                sequence_losses=parts,
                expansion=expansion,
                failed=failed,
            )
            batches.setdefault(int(entry["batch"]), []).append(outcome)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number} of {len(lines)} is damaged ({type(error).__name__}: {error}). "
                f"Restore the file, or keep its first {number - 1} lines and resume"
            ) from None
    if header is None:
        raise UserError(f"{path}: the journal has no header. The run never began: delete its folder and start again")
    return header, batches


def _expansion(entry: Mapping[str, Any], ladders: Sequence[int]) -> Expansion:
    slope, size = (tuple(tuple(float(value) for value in row) for row in entry[name]) for name in ("slope", "size"))
    if [len(row) for row in slope] != list(ladders) or [len(row) for row in size] != list(ladders):
        raise ValueError("an expansion of other ladders")
    return Expansion(slope, size)
