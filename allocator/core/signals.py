"""Signals: a few numbers per block or unit of a dense model, measured once, from which rules allocate sparsity."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from allocator.core.errors import UserError
from allocator.core.files import write_atomic

Signal = Literal[
    "outliers", "median", "hill", "influence", "angle", "dims", "magnitude", "lamp", "fluctuation", "gradient"
]
"""Arrays in the order of the space; B blocks, U units, Q + 1 quantiles. A Wanda score is |W_ij|·‖X_j‖₂.

- ``outliers`` [B]: share of a block's Wanda scores above five times their mean.
- ``median`` [B]: median of a block's Wanda scores.
- ``hill`` [B]: Hill exponent of the tail of the eigenvalues of WᵀW, averaged over a block's matrices.
- ``influence`` [B]: 1 - cosine of a block's input and output, averaged over tokens.
- ``angle`` [B]: the angle between the two over π, averaged over tokens.
- ``dims`` [U, 2]: rows and columns of a unit's matrix.
- ``magnitude`` [U, Q + 1]: quantiles of |w| in a unit's matrix, from the smallest weight to the largest.
- ``lamp`` [U, Q + 1]: quantiles of the LAMP score w_u² / Σ_{v ≥ u} w_v², weights of the matrix in increasing order.
- ``fluctuation`` [U, items]: Var(X_j)·‖W_:j‖² of the columns of a unit's output projection, standardised within the
  unit and averaged over the columns of each item; NaN beyond the unit's last item.
- ``gradient`` [U]: |L(θ + εz) - L(θ - εz)| / 2ε, where z changes only the unit's weights.
"""

SIGNALS: tuple[Signal, ...] = get_args(Signal)

QUANTILES = 1024
"""Q. A threshold meets a budget to within a thousandth of a matrix, which is finer than any ladder."""


@dataclass(frozen=True)
class Signals:
    """Signals of one dense model on one calibration text.

    Attributes:
        values: The collected signals by name; see :data:`Signal`.
    """

    values: Mapping[Signal, np.ndarray]

    def __getitem__(self, name: Signal) -> np.ndarray:
        return self.values[name]

    def missing(self, wanted: Collection[Signal]) -> set[Signal]:
        """Return the wanted signals that were not collected."""
        return set(wanted) - set(self.values)

    def merged(self, other: Signals) -> Signals:
        """Return these signals together with others of the same model."""
        return Signals({**self.values, **other.values})

    def save(self, path: Path) -> None:
        """Write all arrays into one file, atomically."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: value for name, value in self.values.items()}
        np.savez(buffer, **arrays)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Signals:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: The file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls({name: file[name] for name in SIGNALS if name in file})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not readable signals: {error}. Delete it, and they are collected again") from None
