"""Model folders that do not hold plain weights: adapters, quantised weights, files of other formats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allocator.core.errors import UserError

_PLAIN = ("BF16", "F16", "F32", "F64")
_ADAPTERS = ("adapter_config.json", "adapter_model.*")
_ADAPTED = re.compile(r"(^base_model\.)|(\.(lora_\w+|base_layer|modules_to_save)\.)")
_PACKED = re.compile(
    r"(\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|SCB|absmax"
    r"|quant_map|input_scale|nested_absmax)|_blocks|_scales|\.quant_state\.\w+)$"
)
_QUANTISED = ("quantization_config", "compression_config")
_OTHER = {
    "*.gguf": "GGUF",
    "*.bin": "pickled PyTorch",
    "*.pt": "pickled PyTorch",
    "*.pth": "pickled PyTorch",
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
}
_GGUF = "from_pretrained(FOLDER, gguf_file=FILE)"


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model in safetensors, without an adapter.

    An adapter in the folder is an error, because what transformers loads would depend on the machine. If ``peft`` is
    installed, transformers adds the adapter to the model. If not, it ignores the adapter. It says so in neither case.

    Raises:
        UserError: The folder holds an adapter, or only weights of another format.
    """
    if found := _find_first(folder, _ADAPTERS):
        beside = ", or move the adapter's files elsewhere" if (folder / "config.json").is_file() else ""
        raise UserError(
            f"model: {folder / found}: an adapter (LoRA, PEFT), which is not part of the weights. Merge it: load the "
            f"folder with peft's AutoPeftModelForCausalLM, and save_pretrained what merge_and_unload() gives{beside}"
        )
    if _find_first(folder, ("*.safetensors", "*.safetensors.index.json")):
        return
    for pattern, kind in _OTHER.items():
        if found := _find_first(folder, (pattern,)):
            loaded = _GGUF if kind == "GGUF" else "from_pretrained"
            raise UserError(
                f"model: {folder / found}: weights of another format ({kind}), and there is no *.safetensors file. "
                f"Load the model with transformers' {loaded}, and save it to a new folder with save_pretrained"
            )


def check_tensors(folder: Path, config: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    """Check that tensors are plain weights: floating-point numbers, with one tensor for each matrix.

    Raises:
        UserError: A tensor is quantised or packed, or belongs to an adapter.
    """
    if name := next((name for name in dtypes if _ADAPTED.search(name)), None):
        raise UserError(
            f"model: {folder}: {name} is part of an adapter (LoRA, PEFT) that is not merged. Load the model with peft, "
            "and save_pretrained what merge_and_unload() gives"
        )
    packed = (found for name, dtype in dtypes.items() if (found := _describe_packed(name, dtype)))
    if found := _describe_quantisation(config) or next(packed, None):
        raise UserError(
            f"model: {folder}: quantised weights: {found}. Give the model in floats of 16 or 32 bits that it was made "
            "from, or save_pretrained what transformers' dequantize() gives; quantise what comes out here"
        )


def _describe_quantisation(config: Mapping[str, Any]) -> str | None:
    """Return how a configuration, or a section of it, says that weights are quantised; None if it does not."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _QUANTISED:
            if settings := part.get(key):
                method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
                return f"config.json has {key} ({method or 'of no named method'})"
    return None


def _describe_packed(name: str, dtype: str) -> str | None:
    # other integer tensors are masks and positions, which some checkpoints keep
    if _PACKED.search(name) or dtype.startswith("F8") or (name.endswith(".weight") and dtype not in _PLAIN):
        return f"{name} is of type {dtype}"
    return None


def _find_first(folder: Path, patterns: Sequence[str]) -> str | None:
    return min((path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()), default=None)
