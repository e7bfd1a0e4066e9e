"""The stock class of a model in transformers, its configuration, and the model without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from allocator.core.errors import UserError


def find_stock_class(folder: Path, architecture: str) -> Any:
    """Return the class of an architecture.

    Raises:
        UserError: transformers has no such class. The message names ``folder``.
    """
    found = getattr(transformers, architecture, None)
    if found is None:
        raise UserError(f"model: {folder}: transformers {transformers.__version__} has no {architecture}")
    return found


def build_stock_config(folder: Path, architecture: str, config: Mapping[str, Any]) -> Any:
    """Return a configuration as an object of the architecture's configuration class.

    Raises:
        UserError: transformers has no such class, or the class refuses a value.
    """
    try:
        return find_stock_class(folder, architecture).config_class.from_dict(dict(config))
    except (StrictDataclassError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model: {architecture} does not take this configuration: {reason}. Correct config.json of {folder}"
        ) from None


def build_stock_model(folder: Path, architecture: str, config: Mapping[str, Any]) -> Any:
    """Return the model of a configuration on the meta device, which holds no weights.

    Raises:
        UserError: See :func:`build_stock_config`.
    """
    with torch.device("meta"):
        return find_stock_class(folder, architecture)(build_stock_config(folder, architecture, config))
