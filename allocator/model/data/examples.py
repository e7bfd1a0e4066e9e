"""The input of a model: token ids, or other arrays, with labels for a model that classifies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from allocator.core.files import fingerprint
from allocator.model.data.windows import Coverage

LABELS = "labels"
"""Name of the array with the class of every example. It is not an input of the model."""

_IDS = "input_ids"


@dataclass(frozen=True, slots=True)
class Examples:
    """N inputs of a model: arrays by the names of the model's arguments.

    Plain text has one array, ``input_ids`` of shape [N, length].

    Attributes:
        arrays: Arrays with N rows each. They are numpy arrays after reading, and tensors when a model runs.
        length: How many tokens one example counts as. Every split and fidelity is counted in tokens.
        coverage: How much of each text a split of plain text holds, by the name of the text. Empty for other examples,
            and for a part of a split.
    """

    arrays: Mapping[str, Any]
    length: int
    coverage: Mapping[str, Coverage] = field(default_factory=dict, compare=False)

    @classmethod
    def from_ids(cls, ids_nt: Any) -> Examples:
        """Wrap token ids, [sequences, length]."""
        return cls({_IDS: ids_nt}, ids_nt.shape[1])

    @property
    def num_tokens(self) -> int:
        """How many tokens the examples count as, together."""
        return len(self) * self.length

    @property
    def inputs(self) -> dict[str, Any]:
        """Inputs of the model, by the name of the argument."""
        return {name: array for name, array in self.arrays.items() if name != LABELS}

    @property
    def labels(self) -> Any | None:
        """The class of every example, [N]. None if there are no labels."""
        return self.arrays.get(LABELS)

    @property
    def is_plain_text(self) -> bool:
        """Whether token ids are the only array."""
        return {*self.arrays} == {_IDS}

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, rows: slice) -> Examples:
        """Return some of the examples."""
        return Examples({name: array[rows] for name, array in self.arrays.items()}, self.length)

    def first_tokens(self, count: int) -> Examples:
        """Return plain text cut to its first ``count`` tokens, and other examples as they are."""
        return Examples.from_ids(self.arrays[_IDS][:, :count]) if self.is_plain_text else self

    def split(self, size: int) -> list[Examples]:
        """Return batches of at most ``size`` examples."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: str | torch.device) -> Examples:
        """Return the examples on a device. The arrays must be tensors."""
        return Examples({name: tensor.to(device) for name, tensor in self.arrays.items()}, self.length)

    def to_tensors(self) -> Examples:
        """Return a copy as tensors."""
        return Examples({name: torch.from_numpy(np.array(array)) for name, array in self.arrays.items()}, self.length)

    def fingerprint(self) -> str:
        """Return the hash of all numpy arrays. For plain text, the ids are hashed as lists."""
        if self.is_plain_text:
            return fingerprint(self.arrays[_IDS].tolist())
        arrays = {
            name: [list(a.shape), str(a.dtype), hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()]
            for name, a in sorted(self.arrays.items())
        }
        return fingerprint({"arrays": arrays, "length": self.length})
