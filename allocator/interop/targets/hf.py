"""The executed plan as other programs load it, with the sizes of its layers in the configuration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from allocator.core.files import read_json
from allocator.interop.contract import Source, Target
from allocator.interop.verification import write_verify
from allocator.interop.weights import COMPARE, open_executed, state_head_dim, state_sizes, uses_llama_keys
from allocator.model.live.write import write_config


class HuggingFace(Target):
    """Writes the checkpoint as it is, and for structured plans ``per_layer_config`` into its configuration.

    That key, of transformers from 5.14 on, maps the index of a layer to what differs in it from the rest of the
    configuration. Stock classes of the Llama kind do not build from it yet, and raise where they read for the whole
    model what differs in a layer, unless the configuration allows that. It is allowed: ``LlamaConfig`` reads the number
    of heads whenever it is made. (transformers then warns, once for each key.) Models are built by the modelling file
    beside the weights, which has the shapes from ``pruned`` and hides the key from the stock class, today's and one
    that builds from it. Configurations without Llama's keys, or of fused matrices, go without it.
    """

    name = "hf"
    writes = "checkpoint with per_layer_config; of masks, dense with zeros"
    patterns = ("structured", "unstructured", "n:m")
    any_kind = True

    def check(self, source: Source) -> None:
        """Check the checkpoint."""
        open_executed(source, self.name)

    def write(self, source: Source, folder: Path) -> list[str]:
        """Copy the checkpoint, and say in its configuration how layers differ."""
        assert source.executed is not None
        for path in source.executed.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        config = read_json(source.executed / "config.json", "model configuration")
        write_config(folder, {**config, **_heterogeneous(source)})
        write_verify(folder, source)
        if "auto_map" in config:
            how = "it loads in transformers with trust_remote_code=True: stock classes do not build from such a key yet"
        else:
            how = "it loads in transformers as the dense model does; its zeros save neither memory nor time"
        return [how, COMPARE]


TARGET = HuggingFace()


def _heterogeneous(source: Source) -> dict[str, Any]:
    """Return what a configuration says of layers that differ: nothing where none does, or it has no keys for it."""
    plan, config, layers = source.plan, source.checkpoint.config, dict[str, dict[str, Any]]()
    if not source.checkpoint.kind.generates or not uses_llama_keys(source):
        return {}
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        if unit.kind == "matrix" or level == 0:
            continue
        layer = layers.setdefault(str(unit.block), {})
        if unit.kept[level]:
            layer |= state_sizes(unit, unit.kept[level], config)
        else:
            layer["skip"] = [*layer.get("skip", ()), unit.part]
    if not layers:
        return {}
    return {**state_head_dim(source), "allow_global_per_layer_attribute_access": True, "per_layer_config": layers}
