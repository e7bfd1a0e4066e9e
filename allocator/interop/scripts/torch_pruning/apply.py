"""Narrow a model with Torch-Pruning, by the ratios next to this script.

    python apply.py MODEL OUT

MODEL is a folder in the Hugging Face format, and OUT the folder to write: a checkpoint that loads with
`trust_remote_code=True` through the short modelling file next to this script. Needs torch-pruning 1.6 and transformers.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import torch_pruning
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
MODELLING = "modeling_pruned.py"


class Heads(dict):
    """Heads of the dense model, which stay as they are.

    Torch-Pruning counts query heads down while it prunes. As soon as there are as many as key heads it takes them for
    heads without groups, and leaves the whole attention as it was.
    """

    def __setitem__(self, module, count):
        """Change nothing."""


def resolve(model, arguments):
    """Return Torch-Pruning's arguments with modules and parameters in place of their names."""
    found = {**dict(model.named_parameters()), **dict(model.named_modules())}
    resolved = {
        key: [found[name] for name in value] if isinstance(value, list) else {found[n]: v for n, v in value.items()}
        for key, value in arguments.items()
    }
    return {**resolved, "num_heads": Heads(resolved["num_heads"])}


def prune(model, arguments):
    """Remove the channels and heads of the smallest norm."""
    model.config.use_cache = False  # a cache has the tracing never end
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, 8, dtype=torch.long),
        torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        prune_num_heads=True,
        prune_head_dims=False,
        **resolve(model, arguments),
    )
    pruner.step()


def save(model, before, source, out):
    """Save the model, with the shapes of its smaller matrices in the configuration."""
    weights = {name.removesuffix(".weight"): list(value.shape) for name, value in model.named_parameters()}
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(out)
    shutil.copy(HERE / MODELLING, out / MODELLING)
    config = json.loads((Path(source) / "config.json").read_text())
    config["pruned"] = {
        "architecture": type(model).__name__,
        "shapes": {name: shape for name, shape in weights.items() if len(shape) == 2 and shape != before[name]},
        "biases": [],
        "removed": {},
    }
    config["architectures"] = ["PrunedForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_pruned.PrunedForCausalLM"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    """Narrow a model, and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", attn_implementation="eager", trust_remote_code=False
    ).eval()
    before = {name.removesuffix(".weight"): list(value.shape) for name, value in model.named_parameters()}
    prune(model, json.loads((HERE / "ratios.json").read_text()))
    save(model, before, arguments.model, arguments.out)


if __name__ == "__main__":
    main()
