"""Names of tensors: those in the files of a checkpoint, and those in the model.

They differ where files have the names of an older version, or those of the model without its head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from allocator.core.errors import UserError
from allocator.model.checkpoint.stock import build_stock_model


def map_names(
    folder: Path, config: Mapping[str, Any], architecture: str, stored: Iterable[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the name in the model of every tensor in the files, and the configuration with every default.

    Tensors without a parameter in the model are left out, as transformers does: an unused head, or a tied tensor.

    Args:
        folder: The checkpoint's folder, for messages.
        config: The content of ``config.json``.
        architecture: The dense model's class.
        stored: Names in the files.

    Raises:
        UserError: transformers has no such class, splits a tensor into several parameters, or misses a tensor.
    """
    model = build_stock_model(folder, architecture, config)
    own = {name for name, _ in model.named_parameters()}
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    shapes = model.state_dict()
    names: dict[str, str] = {}
    pruned = "pruned" in config
    for old in stored:
        new, converted = rename_source_key(old, renamings, converters, model.base_model_prefix, shapes)
        if converted is not None:
            raise UserError(
                f"model: {folder}: {old} is not one parameter of {architecture}, which splits or merges it. "
                "Such checkpoints cannot be pruned"
            )
        if new in own or pruned:  # every tensor of a pruned checkpoint is the model's
            names[old] = new
    if not pruned and (missing := sorted(own - set(names.values()))):
        raise UserError(
            f"model: {folder}: {len(missing)} tensors of {architecture} are missing, first {missing[0]}. "
            "Save the model with save_pretrained"
        )
    return names, model.config.to_dict()
