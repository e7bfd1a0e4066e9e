"""The script in every export that compares what a tool made with the plan, and the file that the script reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allocator.core.files import write_json
from allocator.interop.contract import Source
from allocator.interop.writing import copy_script
from allocator.model.live.write import find_stored_name

PLANNED = "planned.json"
VERIFY = "verify.py"


def write_verify(
    folder: Path,
    source: Source,
    *,
    tolerance: float = 0.0,
    shapes: Sequence[tuple[str, Any]] | None = None,
    kept: Mapping[str, int] | None = None,
) -> str:
    """Write the script that compares a checkpoint with the plan, matrix by matrix; return the command for a user.

    The script needs torch and safetensors, and nothing of this package. It reads the planned figures from a file next
    to it.

    Args:
        folder: The destination.
        source: What is handed over.
        tolerance: Share of a matrix by which its number of zeros may differ, for tools that round.
        shapes: (module, shape) of the matrices that are stored in another shape than the plan's, as padded ones are.
            The removed weights are zeros in them.
        kept: Number of kept weights by module, where the target keeps another number than the plan.
    """
    stored_shapes, kept_weights = dict(shapes or ()), kept or {}
    modules = {}
    for matrix in source.matrices:
        shape = list(stored_shapes.get(matrix.module, matrix.kept_shape))
        modules[find_stored_name(source.checkpoint, f"{matrix.module}.weight").removesuffix(".weight")] = {
            "shape": shape if all(shape) else None,
            "zeros": max(0, shape[0] * shape[1] - kept_weights.get(matrix.module, matrix.kept)),
            "group": None if matrix.group is None else list(matrix.group),
            "transposed": f"{matrix.module}.weight" in source.checkpoint.transposed,
        }
    write_json(folder / PLANNED, {"tolerance": tolerance, "modules": modules})
    copy_script(VERIFY, folder)
    return f"python {VERIFY} CHECKPOINT"
