"""Export target for Hugging Face: the executed plan, with the sizes of its layers in the configuration."""

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
    """Copies the checkpoint. For structured plans, it adds ``per_layer_config`` to the configuration.

    Transformers has this key since 5.14. It maps the index of a layer to the values that differ from the rest of the
    configuration. The stock classes of Llama-like models do not use the key to build layers yet. If a value differs in
    some layer, reading that value for the whole model is an error, unless ``allow_global_per_layer_attribute_access``
    is set. This target sets it, because ``LlamaConfig`` always reads the number of heads for the whole model.
    Transformers then warns once per key.

    The modelling file next to the weights builds the model. It takes the shapes from the key ``pruned``, and hides
    ``per_layer_config`` from the stock class. So the file also works with future stock classes that use
    ``per_layer_config``. A configuration does not get this key if it lacks Llama's keys, or if the model has fused
    matrices.
    """

    name = "hf"
    writes = "checkpoint with per_layer_config; for masks, dense with zeros"
    patterns = ("structured", "unstructured", "n:m")
    any_kind = True

    def check(self, source: Source) -> None:
        """Check the checkpoint of the plan."""
        open_executed(source, self.name)

    def write(self, source: Source, folder: Path) -> list[str]:
        """Copy the checkpoint, and write the sizes that differ between layers into its configuration."""
        assert source.executed is not None
        for path in source.executed.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        config = read_json(source.executed / "config.json", "model configuration")
        write_config(folder, {**config, **_describe_layers(source)})
        write_verify(folder, source)
        if "auto_map" in config:
            how = "it loads in transformers with trust_remote_code=True: stock classes cannot build it yet"
        else:
            how = "it loads in transformers as the dense model does; its zeros save neither memory nor time"
        return [how, COMPARE]


TARGET = HuggingFace()


def _describe_layers(source: Source) -> dict[str, Any]:
    """Return the configuration keys that describe layers with other sizes.

    The result is empty if no layer differs, or if the configuration has no keys for the sizes.
    """
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
