"""The states of trained candidates on disk, from which later stages continue: a folder of the run.

A state is a function of its allocation and the tokens that it was trained on. A missing state, because a worker died or
the folder is not shared, costs the time to train again, and nothing else.
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
    """The states of trained candidates by request. Writes are atomic, and equal in every process."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made by the first write."""
        self._folder = folder

    def load(self, request: Request) -> tuple[int, Mapping[str, torch.Tensor]] | None:
        """Return the longest training towards a request: its tokens and its state; None if there is none."""
        paths = sorted(
            (int(path.stem.split("-")[2]), path)
            for path in self._folder.glob(f"{_name(request.allocation)}-*-*{_SUFFIX}")
        )
        for trained, path in reversed(paths):
            if trained <= request.training:
                try:
                    return trained, load_file(path)
                except (SafetensorError, OSError):  # truncated by a crash of the machine, or removed
                    continue
        return None

    def save(self, request: Request, state: Mapping[str, torch.Tensor]) -> None:
        """Write the state that a request led to.

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
                "each candidate of a stage takes twelve bytes for every parameter that it keeps"
            ) from None

    def forget(self, done: Iterable[Request]) -> None:
        """Remove the states of lower fidelities than a batch has. No later stage continues them."""
        least = min((request.tokens for request in done if request.training), default=0)
        for path in self._folder.glob("*") if least else ():
            if path.suffix != _SUFFIX or int(path.stem.split("-")[1]) < least:
                path.unlink(missing_ok=True)


def _name(allocation: Allocation) -> str:
    return fingerprint(list(allocation))[7:23]
