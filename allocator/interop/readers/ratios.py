"""Ratio files of other tools: the removed share of each matrix, or of each block."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allocator.core.errors import UserError, did_you_mean
from allocator.interop.readers.levels import Levels, convert_levels
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout, retained_matrices

_SLACK = 1e-6
_FORMATS = (
    "Give a table or JSON object of shares by module, a list of shares by block (.npy, JSON or text), or lines "
    "'module: level'"
)


def read_ratios(path: Path, layout: Layout, checkpoint: Checkpoint, levels: Levels | None = None) -> dict[str, float]:
    """Read the removed share of matrices, by the name of their module.

    If a file has one share per block, all matrices of the block get that share. If a file has levels, ``metadata.pth``
    next to it defines them. EvoPress, Týr-the-Pruner and DarwinLM write that file.

    Args:
        path: ``.npy``, ``.csv`` (columns ``module`` and ``sparsity``), ``.json`` (an object by module, or a list by
            block), or text: lines ``module: level``, or numbers by block.
        layout: The layout of the model.
        checkpoint: The model.
        levels: The meaning of levels. None to read it from the metadata.

    Raises:
        UserError: The file has none of these formats, names a module that the model lacks, or has a share outside
            [0, 1].
    """
    content = _read_file(path)
    if isinstance(content, list):
        ratios = _spread_over_blocks(path, content, layout)
    else:
        known = {
            module
            for sub_block in layout.sub_blocks
            for module in (*sub_block.modules, *retained_matrices(sub_block, checkpoint))
        }
        for module in content:
            if module not in known:
                raise UserError(f"{path}: the model has no prunable matrix {module!r}{did_you_mean(module, known)}")
        is_share = path.suffix in _READERS
        ratios = content if is_share else convert_levels(path, content, levels, layout, checkpoint)
    for module, ratio in ratios.items():
        if not -_SLACK <= ratio <= 1 + _SLACK:
            raise UserError(f"{path}: the share of {module} to remove is {ratio:g}; shares are in [0, 1]")
    return {module: min(max(ratio, 0.0), 1.0) for module, ratio in ratios.items()}


def _read_file(path: Path) -> list[float] | dict[str, float]:
    """Return shares by block, or shares or levels by module."""
    try:
        return _READERS.get(path.suffix, _read_text)(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}. {_FORMATS}") from None
    except (ValueError, TypeError, KeyError, EOFError, OverflowError) as error:
        reason = f"there is no column {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: not an allocation: {reason}. {_FORMATS}") from None


def _read_array(path: Path) -> list[float]:
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("not an array of numpy")  # numpy would try to unpickle it
    array = np.load(path, allow_pickle=False)
    if array.ndim != 1 or np.iscomplexobj(array):
        raise ValueError(f"an array of the shape {list(array.shape)}, of type {array.dtype}")
    return [*map(float, array)]


def _read_table(path: Path) -> dict[str, float]:
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return _collect_unique((row["module"], float(row["sparsity"])) for row in rows)


def _read_json(path: Path) -> list[float] | dict[str, float]:
    data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_collect_unique)
    if not isinstance(data, list | dict):
        raise ValueError(f"neither a list nor an object: {str(data)[:40]!r}")
    return {n: float(share) for n, share in data.items()} if isinstance(data, dict) else [*map(float, data)]


def _read_text(path: Path) -> list[float] | dict[str, float]:
    text = path.read_text(encoding="utf-8")
    if ":" in text:
        return _collect_unique(_parse_level(line) for line in text.splitlines())
    return [*map(float, text.replace(",", " ").split())]


_READERS: Mapping[str, Callable[[Path], list[float] | dict[str, float]]] = {
    ".npy": _read_array,
    ".csv": _read_table,
    ".json": _read_json,
}
"""Readers of shares by file suffix. All other files are read as text."""


def _parse_level(line: str) -> tuple[str, int]:
    module, colon, level = line.rpartition(":")
    if not colon:
        raise ValueError(f"the line {line[:80]!r} has no level")
    return module.strip(), int(level)


def _collect_unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"{name!r} is there twice")
        unique[name] = value
    return unique


def _spread_over_blocks(path: Path, ratios: Sequence[float], layout: Layout) -> dict[str, float]:
    if len(ratios) != len(layout.blocks):
        raise UserError(
            f"{path}: {len(ratios)} shares for {len(layout.blocks)} blocks. Give one for each block of the model"
        )
    return {module: ratios[sub_block.block] for sub_block in layout.sub_blocks for module in sub_block.modules}
