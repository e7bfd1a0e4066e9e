"""Torch-Pruning: ratios by module name, and a script that applies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allocator.core.errors import UserError
from allocator.core.files import write_json
from allocator.core.space import Unit
from allocator.interop.contract import Source, Target
from allocator.interop.verification import write_verify
from allocator.interop.weights import uses_llama_keys
from allocator.interop.writing import copy_script
from allocator.model.family.sub_blocks import SubBlock
from allocator.model.live.write import write_modelling


class TorchPruning(Target):
    """Writes ``ratios.json``, whose keys are those of Torch-Pruning's arguments, and ``apply.py``."""

    name = "torch-pruning"
    writes = "ratios.json by module name, apply.py"
    patterns = ("structured",)

    def check(self, source: Source) -> None:
        """Check that Torch-Pruning can express the plan.

        Raises:
            UserError: The plan removes whole sub-blocks, adds biases, or removes KV groups of several query heads.
        """
        if not uses_llama_keys(source):
            raise UserError(
                f"export: torch-pruning knows the heads of Llama-like models, and this is a "
                f"{source.checkpoint.architecture}. Use --to ratios, or --to hf for the executed plan"
            )
        grouped = source.checkpoint.config["num_attention_heads"] != _count_kv_heads(source)
        for unit, level in zip(source.plan.space.units, source.plan.allocation, strict=True):
            if unit.kept[level] == 0:
                raise UserError(
                    f"export: torch-pruning cannot remove the whole of {unit.name}, as the plan does. Search with "
                    "--set 'ladder.sparsities=[0.25, 0.5, 0.75]', which leaves something, or use --to hf"
                )
            if level and unit.kind == "kv_groups" and grouped:
                raise UserError(
                    f"export: torch-pruning removes query heads and no KV head, and the plan takes KV groups of "
                    f"{unit.name}. Search with --set ladder.attention=query_heads, or use --to hf"
                )
        if source.plan.pruner.get("bias"):
            raise UserError(
                "export: torch-pruning adds no bias, and the plan has biases in place of removed items. "
                "Search with --set pruner.bias=false, or use --to hf"
            )

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the ratios and the script."""
        write_json(folder / "ratios.json", _build_arguments(source))
        copy_script("torch_pruning/apply.py", folder)
        write_modelling(folder, source.checkpoint.architecture)
        write_verify(folder, source)
        return [
            "ratios.json has ratios half an item below the plan's, because Torch-Pruning rounds up",
            "the widths are the plan's; Torch-Pruning chooses by norms which channels and heads it removes, "
            "and it refits nothing: train the result, or expect a higher loss",
            "run: python apply.py MODEL OUT && python verify.py OUT",
        ]


TARGET = TorchPruning()


def _build_arguments(source: Source) -> dict[str, Any]:
    """Return the arguments of Torch-Pruning's pruner, with names in place of modules.

    Query, key and value have a width ratio in addition to that of heads, because without one Torch-Pruning keeps their
    heads too. Its value does not matter, because the width of a head stays.
    """
    units = {
        unit.name: (unit, level) for unit, level in zip(source.plan.space.units, source.plan.allocation, strict=True)
    }
    widths: dict[str, float] = {}
    heads: dict[str, float] = {}
    counts: dict[str, int] = {}
    for sub_block in source.layout.sub_blocks:
        unit, level = units[sub_block.name]
        if level == 0:
            continue
        ratio = _ratio(unit, level)
        modules = _find_narrowed(sub_block, source)
        widths |= dict.fromkeys(modules, ratio)
        if sub_block.part == "attention":
            heads |= dict.fromkeys(modules, ratio)
            counts |= {m: sub_block.total if m in sub_block.rows else _count_kv_heads(source) for m in modules}
    return {
        "pruning_ratio_dict": widths,
        "head_pruning_ratio_dict": heads,
        "num_heads": counts,
        "ignored_layers": _find_ignored(source),
    }


def _ratio(unit: Unit, level: int) -> float:
    """Return the removed share of a unit, less half an item, because Torch-Pruning rounds up."""
    return (unit.total - unit.kept[level] - 0.5) / unit.total


def _find_narrowed(sub_block: SubBlock, source: Source) -> list[str]:
    """Return the matrices of a sub-block whose rows are its items, including key and value of query heads."""
    return [m.module for m in source.matrices if m.unit == sub_block.name and m.module != sub_block.output]


def _find_ignored(source: Source) -> list[str]:
    """Return the modules that keep their width: head, embeddings, output projections, norms of queries and keys."""
    inputs = {module for sub_block in source.layout.sub_blocks for module in _find_narrowed(sub_block, source)}
    names = {
        name.removesuffix(".weight"): shape
        for name, shape in source.checkpoint.shapes.items()
        if name.endswith(".weight")
    }
    matrices = [name for name, shape in names.items() if len(shape) == 2 and name not in inputs]
    sub_blocks = source.layout.sub_blocks
    vectors = [f"{name}.weight" for name, shape in names.items() if len(shape) == 1]
    norms = [name for name in vectors if any(sub_block.owns(name) for sub_block in sub_blocks)]
    return sorted({*matrices, *norms, source.layout.tail[-1]})


def _count_kv_heads(source: Source) -> int:
    config = source.checkpoint.config
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])
