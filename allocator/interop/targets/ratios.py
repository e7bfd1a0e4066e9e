"""Ratios: the sparsity of each matrix and each block, for tools that read a table or an array."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from allocator.core.files import write_json
from allocator.interop.contract import Source, Target
from allocator.interop.verification import write_verify

_COLUMNS = ("module", "block", "part", "rows", "columns", "kept", "sparsity")


class Ratios(Target):
    """Writes ``modules.csv``, ``ratios.json`` and one number for each block, averaged in two ways.

    OWL, Wanda and AlphaPruning give all matrices of a block one ratio. Their ratios are unweighted means over matrices.
    Only the mean weighted by the sizes of the matrices keeps the number of parameters.
    """

    name = "ratios"
    writes = "ratios of modules (CSV, JSON) and of blocks (.npy)"
    patterns = ("structured", "unstructured", "n:m")
    any_kind = True

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the files."""
        with (folder / "modules.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((m.module, m.block, m.part, *m.shape, m.kept, repr(m.sparsity)) for m in source.matrices)
        write_json(folder / "ratios.json", {m.module: m.sparsity for m in source.matrices})
        blocks = sorted({m.block for m in source.matrices})
        by_block = [[m for m in source.matrices if m.block == block] for block in blocks]
        weighted = [1 - sum(m.kept for m in matrices) / sum(m.size for m in matrices) for matrices in by_block]
        unweighted = [float(np.mean([m.sparsity for m in matrices])) for matrices in by_block]
        np.save(folder / "blocks-weighted.npy", np.array(weighted))
        np.save(folder / "blocks-unweighted.npy", np.array(unweighted))
        write_verify(folder, source)
        spread = max(abs(a - b) for a, b in zip(weighted, unweighted, strict=True))
        return [
            "blocks-weighted.npy has the removed share of a block's weights, blocks-unweighted.npy the mean of its "
            f"matrices' ratios, as in OWL; they differ by up to {spread:.4f}",
        ]


TARGET = Ratios()
