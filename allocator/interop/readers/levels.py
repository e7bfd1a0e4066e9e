"""Convert levels of other tools to removed shares. The metadata next to a file of levels defines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.model.family.sub_blocks import SubBlock

METADATA = "metadata.pth"
"""Name of the file that defines levels. It lies next to the file of levels."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The meaning of levels. For a matrix of n weights, a level is the sparsity ``zero`` + level · ``step`` / n."""

    zero: float
    step: int


def convert_levels(
    path: Path, levels: Mapping[str, float], meaning: Levels | None, layout: Layout, checkpoint: Checkpoint
) -> dict[str, float]:
    """Convert levels by module to removed shares.

    Args:
        path: The file of levels.
        levels: The levels.
        meaning: Their meaning; None to read it from the metadata next to the file.
        layout: The layout of the model.
        checkpoint: The model.

    Raises:
        UserError: There is no metadata, or it does not fit the levels and the model.
    """
    metadata_path = path.with_name(METADATA)
    if meaning is not None:
        metadata: Mapping[str, Any] = {"sparsity": meaning.zero, "weights_diff": meaning.step}
    else:
        metadata = _read_metadata(metadata_path)
    sub_blocks = {module: sub_block for sub_block in layout.sub_blocks for module in sub_block.modules}
    try:
        return {
            module: _convert_level(metadata, int(level), sub_blocks[module], checkpoint.shapes[f"{module}.weight"])
            for module, level in levels.items()
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{metadata_path}: does not fit {path.name} and the model ({type(error).__name__}: {error}). Give those "
            "that were made for each other"
        ) from None


def _convert_level(metadata: Mapping[str, Any], level: int, sub_block: SubBlock, shape: Sequence[int]) -> float:
    """Return the share that a level removes from a matrix. The metadata is that of EvoPress, Týr or DarwinLM."""
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


def _read_metadata(path: Path) -> Mapping[str, Any]:
    import torch

    remedy = "Copy it from the folder of the levels' weights, or state the meaning with --level-zero and --level-step"
    if not path.is_file():
        raise UserError(f"{path}: is missing, and levels mean nothing without it. {remedy}")
    try:
        metadata = torch.load(path, weights_only=True)
    except Exception:  # a damaged pickle may raise anything
        raise UserError(f"{path}: cannot be read. {remedy}") from None
    if not isinstance(metadata, dict) or not {"weights_diff", "mha_sparsity", "cols_removed_attn"} & metadata.keys():
        raise UserError(f"{path}: not the metadata of EvoPress, Týr or DarwinLM. {remedy}")
    return metadata
