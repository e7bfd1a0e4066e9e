"""Level files of EvoPress, Týr-the-Pruner and DarwinLM.

All three keep one folder per module. It holds the module's weights at every level, ``<module>/<level>.pth``. A text
file selects one level for each module, in lines ``module: level``. The tools split every line at its colon, so no line
may be blank (``load_sparse_weights`` of EvoPress and Týr, ``load_compressed_weights`` of DarwinLM). ``metadata.pth``
next to the folders defines the levels. Each tool has its own format for it.

This module writes the lines and the metadata. The three tools make the weights with their own pruners.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allocator.core.errors import UserError
from allocator.interop.contract import Source
from allocator.interop.matrices import Matrix
from allocator.interop.writing import write_lines

LEVELS, METADATA = "levels.txt", "metadata.pth"
MODULES = r".*layers.*((q|k|v|o|gate|up|down)_proj)$"
"""Regular expression for the modules that EvoPress and DarwinLM prune (``--prunable_modules``)."""

_OUTPUTS = re.compile(r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)")


@dataclass(frozen=True, slots=True)
class RoundedLevel:
    """The level of a module, and the sparsity before and after rounding to it.

    Attributes:
        module: The name of the module.
        level: The level that is written.
        planned: The sparsity of the module in the plan.
        rounded: The sparsity that the level stands for.
    """

    module: str
    level: int
    planned: float
    rounded: float


def apportion(targets: Sequence[float], limits: Sequence[tuple[int, int]], total: int) -> list[int]:
    """Round numbers to integers that add up to ``total``, with the smallest sum of absolute errors.

    Each number is rounded within its limits. Then single steps of one correct the sum. Each step moves the number whose
    error grows least. The result is optimal, because each error is convex.

    Args:
        targets: The numbers.
        limits: The lowest and the highest integer for each number. They must allow ``total``.
        total: The sum of the integers.
    """
    levels = [min(max(round(target), low), high) for target, (low, high) in zip(targets, limits, strict=True)]
    while missing := total - sum(levels):
        step = 1 if missing > 0 else -1
        movable = [place for place, (low, high) in enumerate(limits) if low <= levels[place] + step <= high]
        assert movable, "the total is out of reach"
        growth = {
            place: abs(levels[place] + step - targets[place]) - abs(levels[place] - targets[place]) for place in movable
        }
        levels[min(movable, key=growth.__getitem__)] += step
    return levels


def write_levels(
    folder: Path, rows: Sequence[RoundedLevel], metadata: Mapping[str, Any], readme: Sequence[str]
) -> None:
    """Write the levels, their meaning, and a README."""
    import torch

    write_lines(folder / LEVELS, (f"{row.module}: {row.level}" for row in rows))
    torch.save(dict(metadata), folder / METADATA)
    write_lines(folder / "README.txt", readme)


def describe_loss(rows: Sequence[RoundedLevel], planned: int, rounded: int) -> list[str]:
    """Describe what rounding changed, in lines for the user.

    Args:
        rows: Every module.
        planned: How many weights inside units the plan keeps.
        rounded: How many weights inside units the levels keep.
    """
    errors = {row.module: abs(row.rounded - row.planned) for row in rows}
    worst = max(errors, key=errors.__getitem__)
    return [
        f"rounding to levels changes a module by up to {errors[worst]:.4f} of it ({worst}), by "
        f"{sum(errors.values()) / len(errors):.4f} on average",
        f"weights kept in units: {planned:,} by the plan, {rounded:,} by the levels",
    ]


def select_outputs(source: Source) -> list[Matrix]:
    """Select the output projection of every sub-block. The structured tools give levels only to these.

    Raises:
        UserError: The tools do not look for the name of one of them.
    """
    matrices = {matrix.module: matrix for matrix in source.matrices}
    for sub_block in source.layout.sub_blocks:
        if not _OUTPUTS.fullmatch(sub_block.output):
            raise UserError(
                f"export: levels are for model.layers.N.self_attn.o_proj and model.layers.N.mlp.down_proj, and this "
                f"model has {sub_block.output}. See 'allocator export --list' for another target"
            )
    return [matrices[sub_block.output] for sub_block in source.layout.sub_blocks]


def count_heads(source: Source) -> int:
    """Count the query heads of a layer."""
    return int(source.checkpoint.config["num_attention_heads"])


def count_kept_columns(source: Source) -> dict[str, int]:
    """Count the columns that the plan keeps of every output projection, by module."""
    return {matrix.module: matrix.kept // matrix.shape[0] for matrix in select_outputs(source)}


def list_dense_shapes(source: Source) -> list[tuple[str, tuple[int, int]]]:
    """List the dense shape of every matrix, for tools that zero weights and keep shapes."""
    return [(matrix.module, matrix.shape) for matrix in source.matrices]


def count_kept_if_zeroed(source: Source, columns: Mapping[str, int]) -> dict[str, int]:
    """Count the weights that stay in each matrix when only columns of output projections are zeroed."""
    return {m.module: m.shape[0] * columns[m.module] if m.module in columns else m.size for m in source.matrices}


def count_kept_if_shrunk(source: Source, columns: Mapping[str, int]) -> int:
    """Count the weights that stay inside units if rows are removed together with the columns that they feed.

    Several query heads may share rows of key and value. These rows stay until all of the heads are removed.
    """
    return sum(
        _count_kept_if_shrunk(
            matrix,
            sub_block.output,
            source.checkpoint.shapes[f"{sub_block.output}.weight"][1],
            columns[sub_block.output],
        )
        for sub_block in source.layout.sub_blocks
        for matrix in source.matrices
        if matrix.unit == sub_block.name
    )


def _count_kept_if_shrunk(matrix: Matrix, output: str, width: int, kept: int) -> int:
    rows, columns = matrix.shape
    if matrix.module == output:
        return rows * kept
    if rows == width:
        return kept * columns
    return matrix.size if kept else 0
