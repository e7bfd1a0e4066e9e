"""Level text: what EvoPress, Týr-the-Pruner and DarwinLM read and write.

All three keep a folder for every module with its weights at every level, ``<module>/<level>.pth``, and say with one
line for each module, ``module: level``, which of them a model is made of. Each line is split on its colon, and none may
be blank (``load_sparse_weights`` of EvoPress and Týr, ``load_compressed_weights`` of DarwinLM). ``metadata.pth`` beside
the folders says what a level means, and differs between them.

What is written here are the lines and the metadata. The weights are theirs to make, by their own pruners.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.core.errors import UserError
from allocator.interop.contract import Source, write_lines
from allocator.interop.targets.matrices import Matrix

LEVELS, METADATA = "levels.txt", "metadata.pth"
MODULES = r".*layers.*((q|k|v|o|gate|up|down)_proj)$"
"""What the peers of IST Austria are told to prune."""

_OUTPUTS = re.compile(r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)")


@dataclass(frozen=True, slots=True)
class Rounded:
    """A module's level.

    Attributes:
        module: Its name.
        level: What is written.
        wanted: Share of it that the plan takes.
        given: Share that the level stands for.
    """

    module: str
    level: int
    wanted: float
    given: float


def apportion(wanted: Sequence[float], limits: Sequence[tuple[int, int]], total: int) -> list[int]:
    """Return whole numbers that add up to ``total`` and are, all in all, the nearest to what is wanted.

    Each is rounded within its limits; then whatever errs least by it is moved by one, until the sum is right. No other
    numbers within the limits have that sum and a smaller sum of absolute errors, for each error is convex.

    Args:
        wanted: Numbers.
        limits: The lowest and the highest that each may be; ``total`` must be within reach.
        total: What they add up to.
    """
    levels = [min(max(round(each), low), high) for each, (low, high) in zip(wanted, limits, strict=True)]
    while missing := total - sum(levels):
        step = 1 if missing > 0 else -1
        movable = [place for place, (low, high) in enumerate(limits) if low <= levels[place] + step <= high]
        assert movable, "the total is out of reach"
        dearer = {
            place: abs(levels[place] + step - wanted[place]) - abs(levels[place] - wanted[place]) for place in movable
        }
        levels[min(movable, key=dearer.__getitem__)] += step
    return levels


def write_levels(folder: Path, rows: Sequence[Rounded], metadata: Mapping[str, Any], readme: Sequence[str]) -> None:
    """Write the lines, what they mean, and how to use them."""
    import torch

    write_lines(folder / LEVELS, (f"{row.module}: {row.level}" for row in rows))
    torch.save(dict(metadata), folder / METADATA)
    write_lines(folder / "README.txt", readme)


def lost(rows: Sequence[Rounded], planned: int, given: int) -> list[str]:
    """Return what rounding changed, in lines for a user.

    Args:
        rows: Every module.
        planned: Weights of the matrices of all units that the plan keeps.
        given: Weights of them that the levels keep.
    """
    errors = {row.module: abs(row.given - row.wanted) for row in rows}
    worst = max(errors, key=errors.__getitem__)
    return [
        f"rounding to levels changes a module by up to {errors[worst]:.4f} of it ({worst}), by "
        f"{sum(errors.values()) / len(errors):.4f} on average",
        f"weights kept in units: {planned:,} by the plan, {given:,} by the levels",
    ]


def outputs(source: Source) -> list[Matrix]:
    """Return the output projection of every sub-block; structured peers put a level on each, and on nothing else.

    Raises:
        UserError: One has a name that they do not find.
    """
    matrices = {matrix.module: matrix for matrix in source.matrices}
    for sub_block in source.layout.sub_blocks:
        if not _OUTPUTS.fullmatch(sub_block.output):
            raise UserError(
                f"export: levels are for model.layers.N.self_attn.o_proj and model.layers.N.mlp.down_proj, and this "
                f"model has {sub_block.output}. See 'allocator export --list' for another target"
            )
    return [matrices[sub_block.output] for sub_block in source.layout.sub_blocks]


def num_heads(source: Source) -> int:
    """Return the query heads of a layer."""
    return int(source.checkpoint.config["num_attention_heads"])


def columns_kept(source: Source) -> dict[str, int]:
    """Return how many columns of every output projection the plan keeps."""
    return {matrix.module: matrix.kept // matrix.shape[0] for matrix in outputs(source)}


def dense_shapes(source: Source) -> list[tuple[str, tuple[int, int]]]:
    """Return the dense shape of every matrix, for peers that leave zeros in place of what goes."""
    return [(matrix.module, matrix.shape) for matrix in source.matrices]


def zeroed(source: Source, columns: Mapping[str, int]) -> dict[str, int]:
    """Return the weights that stay in every matrix where only columns of output projections are zeroed."""
    return {m.module: m.shape[0] * columns[m.module] if m.module in columns else m.size for m in source.matrices}


def shrunk(source: Source, columns: Mapping[str, int]) -> int:
    """Return the weights in units that stay once rows go with the columns that they feed.

    Rows of key and value that several query heads share stay as long as any head does.
    """
    return sum(
        _shrunk(
            matrix,
            sub_block.output,
            source.checkpoint.shapes[f"{sub_block.output}.weight"][1],
            columns[sub_block.output],
        )
        for sub_block in source.layout.sub_blocks
        for matrix in source.matrices
        if matrix.unit == sub_block.name
    )


def _shrunk(matrix: Matrix, output: str, width: int, kept: int) -> int:
    rows, columns = matrix.shape
    if matrix.module == output:
        return rows * kept
    if rows == width:
        return kept * columns
    return matrix.size if kept else 0
