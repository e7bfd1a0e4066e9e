"""Loading a causal language model and its tokenizer with transformers: dense, or a compact checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

from allocator.core.errors import UserError
from allocator.model import modeling_pruned
from allocator.model.headers import ModelFiles


def load_model(files: ModelFiles, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a model for inference: evaluation mode, no gradients.

    A compact checkpoint is loaded through this package's own copy of the modelling code, never through the
    code in its folder.

    Raises:
        UserError: transformers has no such architecture, or tensors are missing.
    """
    pruned = files.config.get("pruned")
    name = pruned["architecture"] if pruned else files.architecture
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise UserError(f"model: {files.folder}: transformers {transformers.__version__} has no {name}")
    if pruned:
        architecture = modeling_pruned.pruned_class(architecture)
    transformers.utils.logging.disable_progress_bar()
    model, loading = architecture.from_pretrained(
        files.folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model: {files.folder}: {len(missing)} tensors are missing, first {missing[0]}. Copy the model again"
        )
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def load_tokenizer(folder: Path) -> tuple[Callable[[str], list[int]], int]:
    """Return a function from text to ids, without special tokens, and the id that separates documents.

    Raises:
        UserError: The folder has no tokenizer, or the tokenizer has no end-of-text token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: {folder}: no readable tokenizer: {reason}. Copy the model again") from None
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if separator is None:
        raise UserError(f"model: {folder}: the tokenizer has neither an end-of-text nor a begin-of-text token")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode, int(separator)
