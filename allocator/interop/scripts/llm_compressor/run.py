"""Prune a model with LLM Compressor, by the recipe next to this script.

    python run.py MODEL TEXT OUT

MODEL is a folder in the Hugging Face format, TEXT a .txt or .jsonl file (key "text") or a folder of them, and OUT is
the folder to write. Needs llmcompressor 0.14.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from calibration import sequences
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

RECIPE = Path(__file__).parent / "recipe.yaml"


def check_order(model):
    """Stop where the recipe would prune other modules than it names.

    LLM Compressor assigns the sparsities in the order of `named_modules()`, independent of the order of `targets`.
    """
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, trust_remote_code=False))
    names = [name for name, _ in built.named_modules()]
    for stage in yaml.safe_load(RECIPE.read_text()).values():
        for group in stage.values():
            for modifier in group.values():
                targets = modifier["targets"]
                if targets != [name for name in names if name in set(targets)]:
                    sys.exit(f"{RECIPE}: its modules are not in the order of {model}'s. Export the plan again")


def main():
    """Prune a model, and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("text", help="file or folder to calibrate with")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--samples", type=int, default=512, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    arguments = parser.parse_args()
    check_order(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    tokens = sequences(arguments.text, tokenizer, arguments.samples, arguments.length)
    oneshot(
        model=arguments.model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * arguments.length] * len(tokens)}),
        recipe=str(RECIPE),
        max_seq_length=arguments.length,
        num_calibration_samples=arguments.samples,
        shuffle_calibration_samples=False,
        pipeline="sequential",  # all modifiers in one pass, so that each block sees what all of them left before it
        output_dir=arguments.out,
    )


if __name__ == "__main__":
    main()
