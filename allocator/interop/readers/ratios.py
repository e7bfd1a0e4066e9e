"""Allocations of other tools: files that say what share of each matrix, or of each block, goes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from allocator.core.errors import UserError, did_you_mean
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout, retained_matrices
from allocator.model.family.sub_blocks import SubBlock

METADATA = "metadata.pth"
"""What says, beside a file of levels, what they mean."""

_SLACK = 1e-6
_SHAPES = (
    "Give a table or JSON object of shares by module, a list of shares by block (.npy, JSON or text), or lines "
    "'module: level'"
)


@dataclass(frozen=True, slots=True)
class Levels:
    """What a level of a matrix of n weights means: the sparsity ``zero`` + level · ``step`` / n."""

    zero: float
    step: int


def read_ratios(path: Path, layout: Layout, checkpoint: Checkpoint, levels: Levels | None = None) -> dict[str, float]:
    """Return the share of matrices that goes, by the name of their module.

    A list by block gives all matrices of a block its share. Levels mean what ``metadata.pth`` beside them says, as
    EvoPress, Týr-the-Pruner and DarwinLM write it.

    Args:
        path: ``.npy``, ``.csv`` (columns ``module`` and ``sparsity``), ``.json`` (an object by module, or a list by
            block), or text: lines ``module: level``, or numbers by block.
        layout: Where the model's units are.
        checkpoint: The model.
        levels: What levels mean, in place of the metadata.

    Raises:
        UserError: The file is none of these, names what the model lacks, or a share is not in [0, 1].
    """
    found = _read(path)
    if isinstance(found, list):
        ratios = _by_block(path, found, layout)
    else:
        known = {
            module
            for sub_block in layout.sub_blocks
            for module in (*sub_block.modules, *retained_matrices(sub_block, checkpoint))
        }
        for module in found:
            if module not in known:
                raise UserError(f"{path}: the model has no prunable matrix {module!r}{did_you_mean(module, known)}")
        ratios = found if path.suffix in (".csv", ".json") else _of_levels(path, found, levels, layout, checkpoint)
    for module, ratio in ratios.items():
        if not -_SLACK <= ratio <= 1 + _SLACK:
            raise UserError(f"{path}: {module} would lose {ratio:g} of itself, and shares that go are in [0, 1]")
    return {module: min(max(ratio, 0.0), 1.0) for module, ratio in ratios.items()}


def _read(path: Path) -> list[float] | dict[str, float]:
    """Return shares by block, or by module shares or levels."""
    try:
        if path.suffix == ".npy":
            return _array(path)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return _once((row["module"], float(row["sparsity"])) for row in csv.DictReader(text.splitlines()))
        if path.suffix == ".json":
            data = json.loads(text, object_pairs_hook=_once)
            return {n: float(each) for n, each in data.items()} if isinstance(data, dict) else [*map(float, data)]
        if ":" in text:
            return _once(_line(line) for line in text.splitlines())
        return [*map(float, text.replace(",", " ").split())]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}. {_SHAPES}") from None
    except (ValueError, TypeError, KeyError, EOFError, OverflowError) as error:
        reason = f"there is no column {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: no allocation: {reason}. {_SHAPES}") from None


def _array(path: Path) -> list[float]:
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("not an array of numpy")  # numpy would ask to unpickle it
    array = np.load(path, allow_pickle=False)
    if array.ndim != 1 or np.iscomplexobj(array):
        raise ValueError(f"an array of the shape {list(array.shape)}, of type {array.dtype}")
    return [*map(float, array)]


def _line(line: str) -> tuple[str, int]:
    module, level = line.split(":")
    return module.strip(), int(level)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _by_block(path: Path, ratios: Sequence[float], layout: Layout) -> dict[str, float]:
    if len(ratios) != len(layout.blocks):
        raise UserError(
            f"{path}: {len(ratios)} shares for {len(layout.blocks)} blocks. Give one for each block of the model"
        )
    return {module: ratios[sub_block.block] for sub_block in layout.sub_blocks for module in sub_block.modules}


def _of_levels(
    path: Path, found: Mapping[str, float], levels: Levels | None, layout: Layout, checkpoint: Checkpoint
) -> dict[str, float]:
    beside = path.with_name(METADATA)
    metadata = {"sparsity": levels.zero, "weights_diff": levels.step} if levels is not None else _metadata(beside)
    sub_blocks = {module: sub_block for sub_block in layout.sub_blocks for module in sub_block.modules}
    try:
        return {
            m: _share(metadata, int(each), sub_blocks[m], checkpoint.shapes[f"{m}.weight"]) for m, each in found.items()
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{beside}: does not fit {path.name} and the model ({type(error).__name__}: {error}). Give those that were "
            "made for each other"
        ) from None


def _share(metadata: Mapping[str, Any], level: int, sub_block: SubBlock, shape: Sequence[int]) -> float:
    """Return the share of a matrix that a level takes: as EvoPress has it, as Týr, and as DarwinLM."""
    if "weights_diff" in metadata:
        return float(metadata["sparsity"] + level * metadata["weights_diff"] / prod(shape))
    attention = sub_block.part == "attention"
    if "mha_sparsity" in metadata:
        zeros, step = ("mha_sparsity", "weights_diff_mha") if attention else ("ffn_sparsity", "weights_diff_mlp")
        return float(metadata[zeros][sub_block.block] + level * metadata[step] / prod(shape))
    counts = metadata["cols_removed_attn" if attention else "cols_removed_mlp"]
    if not 0 <= level < len(counts):
        raise ValueError(f"level {level} of 0 to {len(counts) - 1}")
    return float(counts[level] / shape[1])


def _metadata(path: Path) -> Mapping[str, Any]:
    import torch

    remedy = (
        "Copy it from the folder of the levels' weights, or say what levels mean with --level-zero and --level-step"
    )
    if not path.is_file():
        raise UserError(f"{path}: is missing, and levels mean nothing without it. {remedy}")
    try:
        found = torch.load(path, weights_only=True)
    except Exception:  # whatever a damaged pickle raises
        raise UserError(f"{path}: cannot be read. {remedy}") from None
    if not isinstance(found, dict) or not {"weights_diff", "mha_sparsity", "cols_removed_attn"} & found.keys():
        raise UserError(f"{path}: not the metadata of EvoPress, Týr or DarwinLM. {remedy}")
    return found
