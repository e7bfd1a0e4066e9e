"""What a model is shown: token ids, or examples that are more than that, with labels where a model classifies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allocator.core.files import fingerprint

LABELS = "labels"
"""Name of the array that no model reads: the class of every example."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples that are not token ids alone: arrays by the names under which a model takes them.

    It is cut, moved and counted as an array of token ids [N, length] is, so that both go the same way.

    Attributes:
        arrays: With N rows each: of numpy, or tensors.
        length: How many tokens an example counts as.
    """

    arrays: Mapping[str, Any]
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        """Examples, and the tokens that each counts as."""
        return len(next(iter(self.arrays.values()))), self.length

    @property
    def size(self) -> int:
        """Tokens that all count as."""
        return self.shape[0] * self.length

    def numel(self) -> int:
        """Return :attr:`size`, as tensors do."""
        return self.size

    def __getitem__(self, rows: slice) -> Examples:
        """Return some of the examples."""
        return Examples({name: array[rows] for name, array in self.arrays.items()}, self.length)

    def split(self, size: int) -> list[Examples]:
        """Return batches of so many examples."""
        return [self[start : start + size] for start in range(0, self.shape[0], size)]

    def to(self, device: str | torch.device) -> Examples:
        """Return them on a device."""
        return Examples({name: array.to(device) for name, array in self.arrays.items()}, self.length)


Shown = torch.Tensor | Examples
"""Token ids [sequences, length], or other examples."""


def as_tensors(shown: np.ndarray | Examples) -> Shown:
    """Return a copy of what is in arrays of numpy, as tensors."""
    if isinstance(shown, Examples):
        return Examples({name: torch.from_numpy(np.array(a)) for name, a in shown.arrays.items()}, shown.length)
    return torch.from_numpy(np.array(shown, dtype=np.int64))


def inputs_of(shown: Shown) -> dict[str, torch.Tensor]:
    """Return what a model is called with, by name."""
    if isinstance(shown, Examples):
        return {name: array for name, array in shown.arrays.items() if name != LABELS}
    return {"input_ids": shown}


def labels_of(shown: Shown) -> torch.Tensor | None:
    """Return the class of every example, [N], where they have one."""
    return shown.arrays.get(LABELS) if isinstance(shown, Examples) else None


def fingerprint_examples(shown: np.ndarray | Examples) -> str:
    """Return the hash of what is shown, in arrays of numpy."""
    if not isinstance(shown, Examples):
        return fingerprint(shown.tolist())
    arrays = {
        name: [list(array.shape), str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]
        for name, array in sorted(shown.arrays.items())
    }
    return fingerprint({"arrays": arrays, "length": shown.length})
