"""Opening a dense model: its checkpoint and its family, checked against the class that loads it."""

from __future__ import annotations

from pathlib import Path

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint, read_checkpoint
from allocator.model.family.layout import apply_family_names
from allocator.model.family.schema import Family, find_family
from allocator.model.live.load import check_stock


def open_model(folder: Path, family_file: Path | None = None) -> tuple[Checkpoint, Family]:
    """Read a dense model and find its family. No weight is loaded.

    Args:
        folder: The model's folder.
        family_file: The family file. None for a shipped one.

    Returns:
        The checkpoint, whose tensors have the names that transformers gives them, and the family.

    Raises:
        UserError: The folder holds no model that can be pruned, the model is pruned already, no family serves it, or
            its tensors are not those that its class makes of its configuration.
    """
    checkpoint = read_checkpoint(folder)
    if "pruned" in checkpoint.config:
        raise UserError(f"model: {folder} is pruned already. Give the dense model that it was made from")
    family = find_family(str(checkpoint.config.get("model_type")), family_file)
    checkpoint = apply_family_names(family, checkpoint)
    check_stock(checkpoint, family)
    return checkpoint, family
