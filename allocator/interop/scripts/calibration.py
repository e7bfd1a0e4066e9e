"""Calibration text as sequences of tokens."""

import json
import sys
from pathlib import Path


def documents(path):
    """Yield the texts of a file, or of the .txt and .jsonl files (one text per line, key "text") of a folder."""
    inside = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
    for file in inside if path.is_dir() else [path]:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in text.split("\n") if line.strip())
        else:
            yield text


def sequences(path, tokenizer, samples, length):
    """Return the first tokens of a text, as `samples` lists of `length`; an end token follows each document."""
    tokens, end = [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in documents(Path(path)):
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"] + end
        if len(tokens) >= samples * length:
            return [tokens[start : start + length] for start in range(0, samples * length, length)]
    sys.exit(f"{path} holds {len(tokens)} tokens, and {samples} sequences of {length} are needed")
