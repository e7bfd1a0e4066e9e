"""Zero a model's weights with torch.ao.pruning or torchao, by the list next to this script.

    python apply.py MODEL OUT                 # weights of the smallest magnitude: torch alone
    python apply.py MODEL OUT --wanda TEXT    # by magnitude and input, on a text: torchao 0.18

MODEL is a folder in the Hugging Face format, TEXT a .txt or .jsonl file (key "text") or a folder of them, and OUT is
the folder to write. Needs transformers.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from calibration import sequences
from torch.ao.pruning import WeightNormSparsifier
from transformers import AutoModelForCausalLM, AutoTokenizer

ENTRIES = Path(__file__).parent / "sparsifier.json"


def by_wanda(model, entries, tokens):
    """Return torchao's sparsifier, prepared, after it saw the text."""
    from torchao.sparsity import WandaSparsifier

    for entry in entries:
        group = entry["sparse_block_shape"][1]
        if group > 1 and entry["zeros_per_block"] * 2 != group:
            sys.exit(f"{entry['tensor_fqn']}: torchao's Wanda zeroes half of a group, not "
                     f"{entry['zeros_per_block']} of {group}. Leave --wanda out")  # fmt: skip
    sparsifier = WandaSparsifier()
    sparsifier.prepare(model, entries)
    with torch.no_grad():
        for sequence in tokens:
            model(torch.tensor([sequence], device=model.device))
    return sparsifier


def by_magnitude(model, entries):
    """Return torch's own sparsifier, prepared. Norm 1 ranks weights as norm 2 does, whose squares vanish in 16 bits."""
    sparsifier = WeightNormSparsifier(norm=1)
    sparsifier.prepare(model, entries)
    return sparsifier


def squash(sparsifier):
    """Zero the masked weights. WeightNormSparsifier makes them float32, which weights of 16 bits are not."""
    for group in sparsifier.groups:
        weight = group["module"].parametrizations[group["tensor_name"]]
        weight[0].mask.data = weight[0].mask.to(weight.original.dtype)
    sparsifier.squash_mask()


def main():
    """Zero the weights of a model, and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--wanda", metavar="TEXT", help="file or folder to calibrate Wanda with")
    parser.add_argument("--samples", type=int, default=512, help="sequences of it (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    arguments = parser.parse_args()
    entries = json.loads(ENTRIES.read_text())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", trust_remote_code=False).eval()
    stored = model.state_dict().keys()
    if arguments.wanda:
        tokens = sequences(arguments.wanda, tokenizer, arguments.samples, arguments.length)
        sparsifier = by_wanda(model, entries, tokens)
    else:
        sparsifier = by_magnitude(model, entries)
    sparsifier.step()
    squash(sparsifier)
    # torchao leaves its observers in the model: what they hold is no part of the checkpoint
    state = {name: tensor for name, tensor in model.state_dict().items() if name in stored}
    model.save_pretrained(arguments.out, state_dict=state)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
