"""Loading a model and its tokenizer with transformers: dense, or a compact checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.checkpoint.stock import build_stock_model, find_stock_class
from allocator.model.family.layout import Layout, adapt_family, find_block_numbers
from allocator.model.family.schema import Family
from allocator.model.live import modeling_pruned


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a model for inference: evaluation mode, no gradients.

    A compact checkpoint is loaded through this package's own copy of the modelling code, never through the
    code in its folder.

    Raises:
        UserError: transformers has no such architecture, or tensors are missing.
    """
    pruned = checkpoint.config.get("pruned")
    name = pruned["architecture"] if pruned else checkpoint.architecture
    architecture = find_stock_class(checkpoint.folder, name)
    if pruned:
        architecture = modeling_pruned.pruned_class(architecture)
    transformers.utils.logging.disable_progress_bar()
    model, loading = architecture.from_pretrained(
        checkpoint.folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model: {checkpoint.folder}: {len(missing)} tensors are missing, first {missing[0]}. Copy the model again"
        )
    loaded: nn.Module = model.eval().requires_grad_(False)
    straighten(loaded)
    return loaded


def straighten(model: nn.Module) -> None:
    """Replace transposed and stacked matrices by ordinary linear layers."""
    for name, old in list(model.named_modules()):
        if modeling_pruned.stacked(old):
            model.set_submodule(name, modeling_pruned.split(old))
        elif isinstance(old, Conv1D):
            weight, bias = old.weight.detach(), old.bias.detach()
            new = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
            new.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
            new.bias = nn.Parameter(bias, requires_grad=False)
            model.set_submodule(name, new)


def build_shaped_model(
    checkpoint: Checkpoint, layout: Layout, kept: Mapping[str, int], dtype: torch.dtype
) -> nn.Module:
    """Build a model of random weights whose sub-blocks keep given numbers of items, on the default device.

    Args:
        checkpoint: The dense model; none of its weights is read.
        layout: Its prunable parts.
        kept: Items that each named sub-block keeps. All others are dense.
        dtype: Data type of the weights.

    Raises:
        UserError: transformers has no such architecture.
    """
    architecture = find_stock_class(checkpoint.folder, checkpoint.architecture)
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    shapes: dict[str, list[int]] = {}
    removed: dict[str, str] = {}
    counts: dict[str, list[Any]] = {}
    experts: dict[str, list[Any]] = {}
    for sub_block in layout.sub_blocks:
        count = kept.get(sub_block.name, sub_block.total)
        if sub_block.experts:
            experts[sub_block.name] = [*sub_block.rows, list(range(count))]
        elif count == 0:
            removed |= sub_block.removal
        elif count < sub_block.total:
            columns = {module: checkpoint.shapes[f"{module}.weight"][1] for module in sub_block.rows}
            shapes |= {module: [rows * count, columns[module]] for module, rows in sub_block.rows.items()}
            shapes[sub_block.output] = [checkpoint.shapes[f"{sub_block.output}.weight"][0], sub_block.width * count]
            if sub_block.counts:
                counts[sub_block.parent] = [list(sub_block.counts), [count, sub_block.total]]
    config.pruned = {"shapes": shapes, "removed": removed, "counts": counts, "experts": experts}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = modeling_pruned.pruned_class(architecture)(config)
    finally:
        torch.set_default_dtype(before)
    straighten(model)
    return model.eval().requires_grad_(False)


def list_stock_shapes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that the stock class makes of a configuration. Tied ones appear once.

    Raises:
        UserError: transformers has no such class, or it refuses a value.
    """
    model = build_stock_model(checkpoint.folder, checkpoint.architecture, config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_stock(checkpoint: Checkpoint, family: Family) -> None:
    """Check that tensors have the shapes of the model's class and configuration, and that no two units share one.

    No weight is loaded. Tensors that the class renames when it loads are not compared.

    Raises:
        UserError: A tensor has another shape, a bias has no place in the class or is not in the files, two matrices of
            units share one tensor, or transformers has no such class or cannot build it.
    """
    try:
        model = build_stock_model(checkpoint.folder, checkpoint.architecture, checkpoint.config)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"model: {checkpoint.folder}/config.json: {checkpoint.architecture} cannot be built from it ({reason}). "
            "Copy the model again, or save it again with save_pretrained"
        ) from None
    chains = adapt_family(checkpoint, family).chains
    blocks = [chain.format(block=number) for chain in chains for number in find_block_numbers(checkpoint, chain)]
    units = {f"{b}.{n}" for b in blocks for unit in family.units.values() for n in unit.names}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_shared(checkpoint, units, parameters)
    for name, parameter in parameters.items():
        shape, stored = tuple(parameter.shape), checkpoint.shapes.get(name)
        found = stored[::-1] if stored and name in checkpoint.transposed else stored
        if found not in (None, shape):
            raise UserError(
                f"model: {checkpoint.folder}: {name} has the shape {list(found or ())}, and "
                f"{checkpoint.architecture} makes it "
                f"{list(shape)} by config.json. Correct the configuration, or copy the model again"
            )
    for module in sorted(
        module for module in units if f"{module}.weight" in checkpoint.shapes.keys() & parameters.keys()
    ):
        name = f"{module}.bias"
        if (name in checkpoint.shapes) != (name in parameters):
            odd = (
                "is in the files, and has no place"
                if name in checkpoint.shapes
                else "is not in the files, and has a place"
            )
            raise UserError(
                f"model: {checkpoint.folder}: {name} {odd} in {checkpoint.architecture} by config.json. Correct the "
                "configuration, or copy the model again"
            )


def _check_shared(checkpoint: Checkpoint, units: Collection[str], parameters: Mapping[str, nn.Parameter]) -> None:
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        other = first.setdefault(id(parameter), name)
        if other != name and {name.removesuffix(".weight"), other.removesuffix(".weight")} & {*units}:
            raise UserError(
                f"family: {name} and {other} are one tensor in {checkpoint.architecture}, and what one of them loses "
                "the other would lose too. List both under 'skip' in a family file of your own, and name that with "
                "--set family=FILE"
            )


def load_tokenizer(folder: Path) -> Any:
    """Return a model's tokenizer.

    Raises:
        UserError: The folder has none that can be read.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: {folder}: no readable tokenizer: {reason}. Copy the model again") from None


def load_encoder(folder: Path) -> tuple[Callable[[str], list[int]], int]:
    """Return a function from text to ids, without special tokens, and the id that separates documents.

    Raises:
        UserError: The folder has no tokenizer, or the tokenizer has no end-of-text token.
    """
    tokenizer = load_tokenizer(folder)
    known = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    separator = next((token for token in known if token is not None), None)
    if separator is None:
        raise UserError(f"model: {folder}: the tokenizer has neither an end-of-text nor a begin-of-text token")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode, int(separator)
