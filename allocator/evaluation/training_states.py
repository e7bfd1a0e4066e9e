"""What trained candidates go on from, on disk: a folder inside the run, seen by every worker.

A state is a function of its allocation and the tokens that it was trained on. One that is missing, because a worker
died or the folder is not shared, costs the time to train again, and nothing else.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from allocator.core.errors import UserError
from allocator.core.files import fingerprint
from allocator.core.protocols import Request
from allocator.core.space import Allocation

_SUFFIX = ".safetensors"


class TrainingStates:
    """States by request. Writes are atomic, and equal whoever writes."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made when it is needed."""
        self._folder = folder

    def load(self, request: Request) -> tuple[int, Mapping[str, torch.Tensor]] | None:
        """Return the state trained the furthest towards a request, after how many tokens; None where there is none."""
        found = sorted(
            (int(path.stem.split("-")[2]), path)
            for path in self._folder.glob(f"{_name(request.allocation)}-*-*{_SUFFIX}")
        )
        for trained, path in reversed(found):
            if trained <= request.training:
                try:
                    return trained, load_file(path)
                except (SafetensorError, OSError):  # cut short by a crash of the machine, or gone
                    continue
        return None

    def save(self, request: Request, state: Mapping[str, torch.Tensor]) -> None:
        """Keep the state that a request led to.

        Raises:
            UserError: The disk is full, or fails.
        """
        path = self._folder / f"{_name(request.allocation)}-{request.tokens}-{request.training}{_SUFFIX}"
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir(exist_ok=True)
            save_file(dict(state), temporary)
            temporary.replace(path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{self._folder}: trained candidates cannot be kept ({error}). Free some space and resume: "
                "each takes twelve bytes for every parameter that is left, and there are as many as a stage has"
            ) from None

    def forget(self, done: Iterable[Request]) -> None:
        """Remove what a batch went on from, or passed over: states of lower fidelities than its own."""
        least = min((request.tokens for request in done if request.training), default=0)
        for path in self._folder.glob("*") if least else ():
            if path.suffix != _SUFFIX or int(path.stem.split("-")[1]) < least:
                path.unlink(missing_ok=True)


def _name(allocation: Allocation) -> str:
    return fingerprint(list(allocation))[7:23]
