"""LLM Compressor: a recipe of exact module names, and a script that runs it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml

from allocator.core.errors import UserError
from allocator.interop.contract import Source, Target, require_linear_layers
from allocator.interop.matrices import Matrix, round_share_up
from allocator.interop.verification import write_verify
from allocator.interop.writing import copy_script, format_command
from allocator.model.live.load import build_shaped_model

_MODIFIERS = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}

_COLUMNS = 128
"""Columns that SparseGPT solves at once; it removes one weight too many from each such part."""

_TIES = 0.0005
"""Share of a matrix that SparseGPT may remove in addition, because it also removes ties with the last weight."""


class LlmCompressor(Target):
    """Writes ``recipe.yaml`` and ``run.py``.

    A modifier assigns its list of sparsities in the order of the model's modules, independent of the order of its
    targets. Both lists are therefore in that order.
    """

    name = "llm-compressor"
    writes = "recipe.yaml, run.py"
    patterns = ("unstructured", "n:m")

    def check(self, source: Source) -> None:
        """Check that LLM Compressor has the plan's pruner, and that the plan removes something.

        Raises:
            UserError: One of these is not so.
        """
        require_linear_layers(self, source)
        pruner = source.plan.pruner.get("name")
        if pruner not in _MODIFIERS:
            raise UserError(
                f"export: llm-compressor prunes with {' or '.join(_MODIFIERS)}, and the plan is for {pruner}. "
                "Use --to torchao, which zeroes by magnitude"
            )
        if not any(source.plan.allocation):
            raise UserError(
                "export: the plan removes nothing, and llm-compressor cannot run an empty recipe. Give another plan"
            )

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the recipe and the scripts."""
        pruner = source.plan.pruner
        modifiers: dict[tuple[str, str], list[Matrix]] = defaultdict(list)
        for matrix in _sort_by_model(source):
            # SparseGPT cannot remove all weights; Wanda can, and then the score does not matter
            name = _MODIFIERS["wanda" if matrix.kept == 0 else pruner["name"]]
            modifiers[name, _structure(matrix)].append(matrix)
        groups = {
            f"pruning_{number}_modifiers": {name: _settings(name, structure, matrices, pruner.get("damping"))}
            for number, ((name, structure), matrices) in enumerate(modifiers.items())
        }
        recipe = yaml.safe_dump({"pruning_stage": groups}, sort_keys=False)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        copy_script("llm_compressor/run.py", folder)
        copy_script("calibration.py", folder)
        tolerance = _tolerance(modifiers)
        write_verify(folder, source, tolerance=tolerance)
        run = format_command("python", "run.py", "MODEL", "TEXT", "OUT", *_calibration(source))
        lines = [f"run: {run} && python verify.py OUT"]
        if tolerance:
            lines.append(f"SparseGPT rounds up: a matrix may have {tolerance:.4%} more zeros than planned")
        return lines


TARGET = LlmCompressor()


def _sort_by_model(source: Source) -> list[Matrix]:
    """Return the pruned matrices in the order of the model's modules."""
    with torch.device("meta"):
        model = build_shaped_model(source.checkpoint, source.layout, {}, torch.float32)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted((m for m in source.matrices if m.kept < m.size), key=lambda matrix: order[matrix.module])


def _structure(matrix: Matrix) -> str:
    """Return the mask structure: removed weights and group size; ``0:0`` without groups."""
    return "0:0" if matrix.group is None else f"{matrix.group[1] - matrix.group[0]}:{matrix.group[1]}"


def _settings(modifier: str, structure: str, matrices: list[Matrix], damping: float | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"mask_structure": structure, "ignore": ["re:.*lm_head"]}
    if modifier == _MODIFIERS["sparsegpt"]:
        group = int(structure.split(":")[1]) or 1
        settings["block_size"] = max(_COLUMNS // group, 1) * group
        settings |= {} if damping is None else {"dampening_frac": damping}
    return {
        **settings,
        "sparsity": [round_share_up(matrix.size - matrix.kept, matrix.size) for matrix in matrices],
        "targets": [matrix.module for matrix in matrices],
    }


def _tolerance(modifiers: dict[tuple[str, str], list[Matrix]]) -> float:
    """Return the share of a matrix by which its number of zeros may differ from the plan's."""
    free = modifiers.get((_MODIFIERS["sparsegpt"], "0:0"), [])
    return max((max(_TIES, -(-m.shape[1] // _COLUMNS) / m.size) for m in free), default=0.0)


def _calibration(source: Source) -> list[str]:
    """Return arguments that have the runner calibrate on as many tokens as the plan's pruner did."""
    tokens, length = source.plan.pruner.get("tokens"), source.plan.pruner.get("sequence_length")
    return ["--samples", str(tokens // length), "--length", str(length)] if tokens and length else []
