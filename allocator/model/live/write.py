"""Write pruned checkpoints that stock tools can load, and count the parameters of a checkpoint.

The files mirror the dense checkpoint's shards. If shapes changed, ``config.json`` lists them, and a short modelling
file lies beside the weights. Transformers then loads the checkpoint with ``trust_remote_code=True``, without this
package. If only values changed, the checkpoint is an ordinary dense one with zeros.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from allocator.core.errors import UserError
from allocator.core.files import whole_folder, write_json
from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import INDEX, Checkpoint, read_checkpoint
from allocator.model.checkpoint.kinds import CAUSAL, Kind
from allocator.model.family.layout import Layout
from allocator.model.family.sub_blocks import SubBlock
from allocator.model.live.memory import give_back

Replacements = Mapping[str, torch.Tensor | None]
"""New values by tensor name; None for a removed tensor."""

_TEMPLATE_IMPORT = "from transformers import LlamaForCausalLM as Dense"
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
)


def read_tensors(checkpoint: Checkpoint, names: list[str]) -> dict[str, torch.Tensor]:
    """Read some tensors of a checkpoint, in the checkpoint's data type."""
    tensors = {}
    for shard in sorted({checkpoint.shards[name] for name in names}):
        with safe_open(checkpoint.folder / shard, framework="pt") as file:
            own = [name for name in names if checkpoint.shards[name] == shard]
            tensors.update({name: file.get_tensor(find_stored_name(checkpoint, name)) for name in own})
    return {
        name: tensor.T.contiguous() if name in checkpoint.transposed else tensor for name, tensor in tensors.items()
    }


def write_checkpoint(checkpoint: Checkpoint, layout: Layout, replace: Callable[[str], Replacements], out: Path) -> None:
    """Write a pruned copy of a model.

    Args:
        checkpoint: The dense model.
        layout: Its prunable parts.
        replace: Takes the name of a sub-block and returns its new tensors. It is called for one sub-block at a time.
        out: A folder that does not exist yet. It appears only when it is complete.

    Raises:
        UserError: The folder exists, or writing fails.
    """
    with whole_folder(out) as partial:
        try:
            _write(checkpoint, layout, replace, partial)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{out}: the checkpoint cannot be written ({error}). Free some space: a search goes on with --resume, "
                "and a plan may be executed to another disk"
            ) from None


def _write(checkpoint: Checkpoint, layout: Layout, replace: Callable[[str], Replacements], folder: Path) -> None:
    shapes: dict[str, list[int]] = {}
    gone: set[str] = set()
    weight_map: dict[str, str] = {}
    added: list[str] = []
    cached: tuple[str, Replacements] = ("", {})
    owners = {
        name: sub_block.name for sub_block in layout.sub_blocks for name in checkpoint.shapes if sub_block.owns(name)
    }
    for shard in sorted(set(checkpoint.shards.values())):
        tensors: dict[str, torch.Tensor] = {}
        give_back()
        with safe_open(checkpoint.folder / shard, framework="pt") as file:
            for name in sorted(key for key, parent in checkpoint.shards.items() if parent == shard):
                owner, stored = owners.get(name), find_stored_name(checkpoint, name)
                if owner is not None and cached[0] != owner:
                    cached = (owner, replace(owner))
                new = cached[1].get(name, ...) if owner is not None else ...
                if new is None:
                    gone.add(name)
                    continue
                weight_map[stored] = shard
                if new is ...:
                    tensors[stored] = file.get_tensor(stored)
                    continue
                as_stored = new.T if name in checkpoint.transposed else new
                tensors[stored] = as_stored.to(find_dtype(checkpoint.dtypes[name])).contiguous()
                if name.endswith(".weight") and tuple(new.shape) != checkpoint.shapes[name]:
                    shapes[name.removesuffix(".weight")] = list(new.shape)
                    bias = name.removesuffix("weight") + "bias"
                    if bias not in checkpoint.shapes and (gained := cached[1].get(bias)) is not None:
                        gained_name = find_stored_name(checkpoint, bias)
                        tensors[gained_name] = gained.to(tensors[stored].dtype).contiguous()
                        weight_map[gained_name] = shard
                        added.append(bias.removesuffix(".bias"))
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    removed: dict[str, str] = {}
    for sub_block in layout.sub_blocks:
        if f"{sub_block.output}.weight" in gone:
            removed |= sub_block.removal
    config = dict(checkpoint.config)
    if shapes or gone:
        counts = {
            sub_block.parent: [
                list(sub_block.counts),
                [shapes[sub_block.output][1] // sub_block.width, sub_block.total],
            ]
            for sub_block in layout.sub_blocks
            if sub_block.counts and sub_block.output in shapes
        }
        experts = {each.name: [*each.rows, _list_kept_experts(each, layout, gone)] for each in layout.mixtures}
        routers = {router for router, _ in experts.values()}
        config["pruned"] = {
            "architecture": checkpoint.architecture,
            "shapes": {module: shape for module, shape in shapes.items() if module not in routers},
            "biases": sorted(added),
            "removed": removed,
            **({"counts": counts} if counts else {}),
            **({"experts": experts} if experts else {}),
            **({"renamed": dict(checkpoint.renames)} if checkpoint.renames else {}),
        }
        kind = checkpoint.kind
        config["architectures"] = [kind.pruned]
        config["auto_map"] = {kind.auto: f"modeling_pruned.{kind.pruned}"}
        write_modelling(folder, checkpoint.architecture, kind)
    write_companions(folder, checkpoint, config, weight_map)


def find_stored_name(checkpoint: Checkpoint, name: str) -> str:
    """Return the name that a tensor has in the files. The tensor may also be a bias that pruning adds."""
    if name not in checkpoint.shapes and name.endswith(".bias"):
        weight = f"{name.removesuffix('bias')}weight"
        return f"{checkpoint.stored.get(weight, weight).removesuffix('weight')}bias"
    return checkpoint.stored.get(name, name)


def _list_kept_experts(mixture: SubBlock, layout: Layout, gone: set[str]) -> list[int]:
    """Return the numbers of the experts that the router keeps. Experts that lost all their channels are among them."""
    whole = mixture.name in {sub_block.name for sub_block in layout.sub_blocks}
    matrices = [f"{expert[0]}.weight" for expert in mixture.experts]
    return [number for number, name in enumerate(matrices) if not whole or name not in gone]


def write_companions(
    folder: Path, checkpoint: Checkpoint, config: Mapping[str, Any], weight_map: Mapping[str, str]
) -> None:
    """Write all files but the weights: the configuration, the tokenizer, and the index if the model has one.

    Args:
        folder: Holds the weights.
        checkpoint: The dense model.
        config: The content of ``config.json``.
        weight_map: The file, inside ``folder``, of every tensor.
    """
    if (checkpoint.folder / INDEX).exists():
        sizes = sum((folder / shard).stat().st_size for shard in set(weight_map.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": sizes}, "weight_map": dict(weight_map)})
    write_config(folder, config)
    for pattern in _COPIED:
        for path in checkpoint.folder.glob(pattern):
            shutil.copy(path, folder / path.name)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_modelling(folder: Path, architecture: str, kind: Kind = CAUSAL) -> None:
    """Write the modelling file that loads a compact checkpoint without this package."""
    code = (resources.files("allocator.model.live") / "modeling_pruned.py").read_text(encoding="utf-8")
    assert _TEMPLATE_IMPORT in code
    line = f"from transformers import {architecture} as Dense"
    code = code.replace(_TEMPLATE_IMPORT, line).replace(CAUSAL.pruned, kind.pruned)
    (folder / "modeling_pruned.py").write_text(code, encoding="utf-8")


def count_params(folder: Path, space: SearchSpace, dense: Checkpoint) -> int:
    """Count the parameters of a saved checkpoint as the budget counts them.

    For structured pruning, count the elements of all tensors. For masks, do not count zeros in the matrices of units.
    Then a kept weight that happens to be zero is not counted either.
    """
    checkpoint = read_checkpoint(folder).with_names_of(dense)
    total = 0
    matrices = {f"{unit.name}.weight" for unit in space.units if unit.kind == "matrix"}
    for name, shape in checkpoint.shapes.items():
        if name in matrices:
            total += int(torch.count_nonzero(read_tensors(checkpoint, [name])[name]))
        else:
            total += int(torch.Size(shape).numel())
    return total


def find_dtype(name: str) -> torch.dtype:
    """Return torch's type of a safetensors data type (``BF16``, ``F32``, ...)."""
    table = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    return table[name]
