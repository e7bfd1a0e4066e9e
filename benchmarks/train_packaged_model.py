"""Trains the small language model that the package carries: its tokenizer, its weights and its card.

The text is Python source already on the machine: the running interpreter's standard library, less the files
that `allocator.model.data.text` holds out, and the installed packages whose licence is permissive.

    python -m benchmarks.train_packaged_model --minutes 78 --threads 2
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from allocator.model.data.text import Document, choose_split, read_standard_library

REPOSITORY = Path(__file__).resolve().parents[1]

HELD_OUT = ("search", "selection", "test")
SEPARATOR = "<|endoftext|>"
SEQUENCE_LENGTH = 512
VOCABULARY = 2048

LIBRARY_COPIES = 4
"""How often the standard library's own files stand in one pass over the text (tests and packages: once)."""

REST_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}

LARGEST_FILE = 300_000
LARGEST_PACKAGE = 2_500_000
LONG_LINE = 30
LARGEST_OVERLAP = 0.2
"""Share of a training file's long lines that may occur in held-out files; above it the file is dropped."""

PERMISSIVE = re.compile(r"MIT|BSD|Apache|Python Software Foundation|PSF", re.IGNORECASE)
OTHER_LICENCE = re.compile(r"GPL|MPL|Mozilla|EPL|Eclipse|Proprietary|CC-BY", re.IGNORECASE)

SPLIT_PATTERN = (
    r" ?__\p{L}+__|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]*(?:\r?\n[ \t]*)+|\s+(?!\S)|\s+"
)
"""As in Llama 3, but a line end goes together with the indentation that follows it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A body of training text: where it comes from, its licence, and its files."""

    name: str
    licence: str
    texts: list[str]
    copies: int = 1

    @property
    def size(self) -> int:
        """Bytes of the text, counted once."""
        return sum(len(text.encode("utf-8")) for text in self.texts)


def read_source_file(path: Path) -> str | None:
    """Returns the text of a file that is fit for training, else None."""
    try:
        if not 256 <= path.stat().st_size <= LARGEST_FILE:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    longest = max(len(line) for line in text.splitlines())
    return None if longest > 1000 else text


def library_files() -> Iterator[tuple[str, Path]]:
    """Yields the names and paths of all the standard library's files, tests included."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
            yield relative.as_posix(), path


def licence_of(distribution: importlib.metadata.Distribution) -> str | None:
    """Returns a distribution's licence in a few words if it is permissive, else None."""
    metadata = distribution.metadata
    classifiers = [c.split("::")[-1].strip() for c in metadata.get_all("Classifier", []) if "License ::" in c]
    free_text = (metadata.get("License") or "").strip().split("\n")[0]
    stated = metadata.get("License-Expression") or ", ".join(classifiers) or free_text
    everything = " ".join([stated, free_text, *classifiers])
    if not PERMISSIVE.search(stated) or OTHER_LICENCE.search(everything):
        return None
    return stated


def package_sources() -> Iterator[Source]:
    """Yields the installed packages of permissive licence, with no vendored code, each up to a size."""
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        licence = licence_of(distribution)
        if licence is None:
            continue
        files = [file for file in distribution.files or [] if file.suffix == ".py"]
        files = [file for file in files if not re.search(r"vendor|thirdparty|third_party", file.as_posix())]
        files.sort(key=lambda file: hashlib.sha256(file.as_posix().encode()).digest())
        texts: list[str] = []
        size = 0
        for file in files:
            text = read_source_file(Path(str(file.locate())))
            if text is not None and size < LARGEST_PACKAGE:
                texts.append(text)
                size += len(text)
        if size > 50_000:
            yield Source(f"{distribution.metadata['Name']} {distribution.version}", licence, texts)


def long_lines(text: str) -> set[str]:
    """Returns a text's distinct lines of at least `LONG_LINE` characters, stripped."""
    return {line for raw in text.splitlines() if len(line := raw.strip()) >= LONG_LINE}


def training_sources() -> list[Source]:
    """Gathers the training text: no held-out file, no near copy of one, no file twice."""
    held_out_lines: set[str] = set()
    library: list[str] = []
    library_rest: list[str] = []
    for name, path in library_files():
        if choose_split(name) != "calibration":
            if "test" not in name.split("/") and "tests" not in name.split("/"):
                held_out_lines |= long_lines(path.read_text(encoding="utf-8", errors="replace"))
            continue
        text = read_source_file(path)
        if text is not None:
            (library_rest if REST_FOLDERS & set(name.split("/")[:-1]) else library).append(text)
    version = ".".join(map(str, sys.version_info[:3]))
    found = [
        Source(f"Python {version} standard library, calibration part", "PSF-2.0", library, LIBRARY_COPIES),
        Source(f"Python {version} standard library, its tests and tables", "PSF-2.0", library_rest),
        *package_sources(),
    ]
    seen: set[bytes] = set()
    sources = []
    for source in found:
        texts = []
        for text in source.texts:
            key = hashlib.sha256(text.encode("utf-8")).digest()
            lines = long_lines(text)
            if key in seen or len(lines & held_out_lines) > LARGEST_OVERLAP * len(lines):
                continue
            seen.add(key)
            texts.append(text)
        if texts:
            sources.append(Source(source.name, source.licence, texts, source.copies))
    return sources


def train_tokenizer(sources: list[Source], folder: Path, sample_bytes: int, seed: int) -> None:
    """Trains the byte-level BPE tokenizer on a sample of the text and writes its two files."""
    texts = [text for source in sources for text in source.texts * source.copies]
    order = np.random.default_rng(seed).permutation(len(texts))
    sample: list[str] = []
    size = 0
    for index in order:
        if size >= sample_bytes:
            break
        sample.append(texts[index])
        size += len(texts[index])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(SEPARATOR, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": SEPARATOR,
        "model_max_length": SEQUENCE_LENGTH,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode_sources(sources: list[Source], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Encodes every file once.

    Returns:
        The tokens of all files, uint16, each file followed by the separator; and, per file, the rows
        (start, end, copies).
    """
    pieces: list[np.ndarray] = []
    rows: list[tuple[int, int, int]] = []
    position = 0
    for source in sources:
        for begin in range(0, len(source.texts), 256):
            for encoding in tokenizer.encode_batch(source.texts[begin : begin + 256]):
                pieces.append(np.asarray([*encoding.ids, 0], dtype=np.uint16))
                rows.append((position, position + len(pieces[-1]), source.copies))
                position += len(pieces[-1])
    return np.concatenate(pieces), np.asarray(rows, dtype=np.int64)


def prepare(cache: Path, seed: int, sample_bytes: int) -> dict[str, Any]:
    """Makes the tokenizer and the token arrays in the cache folder, unless they are there.

    Returns:
        A description of the text used.
    """
    done = cache / "sources.json"
    if not done.exists():
        cache.mkdir(parents=True, exist_ok=True)
        sources = training_sources()
        print(f"text: {sum(s.size for s in sources) / 1e6:.1f} MB in {len(sources)} sources", flush=True)
        train_tokenizer(sources, cache, sample_bytes, seed)
        print("tokenizer trained", flush=True)
        tokens, rows = encode_sources(sources, Tokenizer.from_file(str(cache / "tokenizer.json")))
        np.save(cache / "tokens.npy", tokens)
        np.save(cache / "rows.npy", rows)
        listing = [
            {"name": s.name, "licence": s.licence, "files": len(s.texts), "bytes": s.size, "copies": s.copies}
            for s in sources
        ]
        one_pass = int(((rows[:, 1] - rows[:, 0]) * rows[:, 2]).sum())
        done.write_text(json.dumps({"sources": listing, "tokens": len(tokens), "tokens_one_pass": one_pass}))
    return json.loads(done.read_text())


class Batches:
    """Endless batches of token windows; every pass orders the files, and then the windows, afresh."""

    def __init__(self, tokens: np.ndarray, rows: np.ndarray, seed: int) -> None:
        """Takes the tokens and file rows of `encode_sources`."""
        self._tokens = tokens
        self._rows = np.repeat(rows[:, :2], rows[:, 2], axis=0)
        self._random = np.random.default_rng(seed)
        self._stream = np.empty(0, dtype=np.uint16)
        self._starts: list[int] = []

    def next(self, num_windows: int, length: int) -> Tensor:
        """Returns windows of `length` + 1 tokens, int64, cut out of windows of `SEQUENCE_LENGTH` + 1."""
        windows = []
        while len(windows) < num_windows:
            if not self._starts:
                order = self._random.permutation(len(self._rows))
                self._stream = np.concatenate([self._tokens[a:b] for a, b in self._rows[order]])
                starts = np.arange(0, len(self._stream) - SEQUENCE_LENGTH - 1, SEQUENCE_LENGTH)
                self._starts = self._random.permutation(starts).tolist()
            start = self._starts.pop()
            for offset in range(0, SEQUENCE_LENGTH, length):
                windows.append(self._stream[start + offset : start + offset + length + 1])
        return torch.from_numpy(np.stack(windows).astype(np.int64))


@torch.compiler.disable
def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention in blocks of queries, with a group's query heads folded into rows.

    On a CPU, at these sizes, this takes under half the time of the fused kernel.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    block = length // 4 if length % 4 == 0 else length
    query = (query * (scaling or width**-0.5)).view(batch, groups, share, length, width)
    outputs = []
    for begin in range(0, length, block):
        end = begin + block
        rows = query[:, :, :, begin:end].reshape(batch, groups, share * block, width)
        scores = rows @ key[:, :, :end].transpose(-1, -2)
        future = torch.ones(block, end, dtype=torch.bool).triu(begin + 1).repeat(share, 1)
        mask = torch.zeros(share * block, end, dtype=scores.dtype).masked_fill_(future, -1e4)
        mixed = torch.softmax(scores + mask, dim=-1) @ value[:, :, :end]
        outputs.append(mixed.view(batch, groups, share, block, width))
    output = torch.cat(outputs, dim=3).view(batch, heads, length, width)
    return output.transpose(1, 2), None


def new_model(architecture: str) -> PreTrainedModel:
    """Returns an untrained model: the packaged Llama, or a narrower, deeper Qwen3 for comparisons."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": SEQUENCE_LENGTH, "head_dim": 32, **ends}
    if architecture == "qwen3":
        shape = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=384, tie_word_embeddings=True, **shape, **common))
    shape = {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=480, tie_word_embeddings=True, **shape, **common))


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for the embeddings and the norms."""

    def __init__(self, model: nn.Module, muon_rate: float, adamw_rate: float) -> None:
        """Takes the model and the full learning rates."""
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
        muon = torch.optim.Muon(matrices, lr=muon_rate, momentum=0.95, weight_decay=0.03)
        adamw = torch.optim.AdamW(others, lr=adamw_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._all = [(muon, muon_rate), (adamw, adamw_rate)]

    def step(self, factor: float) -> None:
        """Takes one step at `factor` of the full learning rates, and clears the gradients."""
        for optimizer, rate in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def rate_factor(progress: float) -> float:
    """Returns the learning rate's factor at a share of the time: warm-up, constant, linear decay."""
    if progress < 0.01:
        return 0.05 + 0.95 * progress / 0.01
    return 1.0 if progress < 0.65 else max(0.0, (1.0 - progress) / 0.35)


def held_out_sequences(tokenizer: Tokenizer, split: str, most: int) -> np.ndarray:
    """Returns up to `most` packed sequences of a held-out split of the standard library."""
    documents: list[Document] = [d for d in read_standard_library() if choose_split(d.name) == split]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    tokens = [token for document in documents for token in [*encode(document.text), 0]]
    count = min(most, len(tokens) // SEQUENCE_LENGTH)
    return np.array(tokens[: count * SEQUENCE_LENGTH], dtype=np.int64).reshape(count, SEQUENCE_LENGTH)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the number of bytes each token stands for; the separator stands for none."""
    sizes = [len(tokenizer.id_to_token(index)) for index in range(tokenizer.get_vocab_size())]
    sizes[0] = 0
    return np.asarray(sizes)


@torch.no_grad()
def held_out_loss(model: nn.Module, sequences: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Measures a model on packed sequences.

    Returns:
        Nats per predicted token, bits per byte of the predicted tokens, and their number.
    """
    total = 0.0
    for batch in torch.from_numpy(sequences).split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    predicted = sequences[:, 1:]
    return {
        "nats_per_token": total / predicted.size,
        "bits_per_byte": total / math.log(2) / int(sizes[predicted].sum()),
        "tokens": int(predicted.size),
    }


def save(model: PreTrainedModel, cache: Path, out: Path) -> None:
    """Writes the model in bfloat16 and its tokenizer; each file of the folder is replaced whole."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary)
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        copy = type(model)(model.config).to(torch.bfloat16)
        copy.load_state_dict(weights)
        copy.set_attn_implementation("sdpa")
        copy.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(cache / name, folder / name)
        for file in folder.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)


def train(
    model: PreTrainedModel,
    batches: Batches,
    arguments: argparse.Namespace,
    checkpoint: Callable[[int, float], None],
) -> dict[str, float]:
    """Trains the model for the given time.

    Returns:
        The numbers of the run: tokens, steps, minutes.
    """

    def loss_of(windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    compute = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    optimizers = Optimizers(model, arguments.muon_rate, arguments.adamw_rate)
    for length in (SEQUENCE_LENGTH // 2, SEQUENCE_LENGTH):
        compute(batches.next(4096 // length, length)).backward()
    model.zero_grad(set_to_none=True)
    begin = time.monotonic()
    last_checkpoint = begin
    tokens = steps = 0
    recent: list[float] = []
    while (progress := (time.monotonic() - begin) / (60 * arguments.minutes)) < 1.0:
        length = SEQUENCE_LENGTH // 2 if progress < arguments.short_share else SEQUENCE_LENGTH
        micro_batches = arguments.batch_tokens // 4096
        for _ in range(micro_batches):
            loss = compute(batches.next(4096 // length, length)) / micro_batches
            loss.backward()
            recent.append(loss.item() * micro_batches)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(rate_factor(progress))
        steps += 1
        tokens += arguments.batch_tokens
        now = time.monotonic()
        if steps % 50 == 0:
            print(
                f"step {steps}  {(now - begin) / 60:.1f} min  {tokens / 1e6:.2f} Mtokens  "
                f"{tokens / (now - begin):.0f} tokens/s  loss {np.mean(recent):.3f}",
                flush=True,
            )
            recent.clear()
        if now - last_checkpoint > 60 * arguments.checkpoint_minutes:
            checkpoint(tokens, (now - begin) / 60)
            last_checkpoint = time.monotonic()
    return {"tokens": tokens, "steps": steps, "minutes": (time.monotonic() - begin) / 60}


def write_card(out: Path, record: dict[str, Any]) -> None:
    """Writes the run's numbers: `training.json` for programs, `MODEL_CARD.md` for people."""
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    run, settings, text = record["run"], record["hyperparameters"], record["text"]
    held_out = "\n".join(
        f"| {split} | {loss['tokens']} | {loss['nats_per_token']:.4f} | {loss['bits_per_byte']:.4f} |"
        for split, loss in record["held_out"].items()
    )
    sources = "\n".join(
        f"| {s['name']} | {s['licence']} | {s['files']} | {s['bytes'] / 1e6:.2f} | {s['copies']} |"
        for s in text["sources"]
    )
    total = sum(s["bytes"] for s in text["sources"]) / 1e6
    passes = run["tokens"] / text["tokens_one_pass"]
    (out / "MODEL_CARD.md").write_text(
        f"""# {out.name}

A {record["model_type"]} language model of {record["parameters"]:,} parameters for Python source, trained by
`benchmarks/train_packaged_model.py`. It is there so that an allocation of sparsity can be measured on a
really trained transformer without a download. It is far too small to write code.

## Shape

{record["architecture"]}. Weights in bfloat16. Tokenizer: byte-level BPE, {VOCABULARY} tokens;
`{SEPARATOR}` (id 0) begins, ends and separates documents, and is never added by itself.

## Held-out loss

Standard-library files of the splits `search`, `selection` and `test` (`allocator.model.data.text.choose_split`) were
kept out of the training text, and so was every file with more than {LARGEST_OVERLAP:.0%} of its long
lines in them. Measured on the saved weights, in sequences of {SEQUENCE_LENGTH} tokens:

| split | tokens | nats per token | bits per byte |
|---|---:|---:|---:|
{held_out}

## Training

{run["tokens"] / 1e6:.1f} million tokens seen ({passes:.2f} passes over the text) in {run["steps"]} steps and
{run["minutes"]:.0f} minutes on {record["hardware"]}; seed {record["seed"]}. The schedule follows the clock,
so a run does not repeat to the bit.

- optimizer: Muon (rate {settings["muon_rate"]}, momentum 0.95, weight decay 0.03) for the matrices of the
  layers, AdamW (rate {settings["adamw_rate"]}, betas 0.9 and 0.95, no weight decay) for embeddings and norms;
  gradient norm clipped at 1
- schedule: warm-up over 1 % of the time, constant to 65 %, linear to zero
- batch: {settings["batch_tokens"]} tokens; sequences of {SEQUENCE_LENGTH // 2} tokens for the first
  {settings["short_share"]:.0%} of the time, then {SEQUENCE_LENGTH}
- precision: bfloat16 autocast over float32 weights

## Text

{total:.1f} MB of Python source, {text["tokens"] / 1e6:.1f} million tokens, read from a Python installation.
Identical files, vendored folders and files above {LARGEST_FILE // 1000} kB are left out, and at most
{LARGEST_PACKAGE / 1e6:.1f} MB is taken of one package. Licences are as the packages state them.

| source | licence | files | MB | copies in a pass |
|---|---|---:|---:|---:|
{sources}
"""
    )


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    default_out = REPOSITORY / "allocator" / "packaged" / "tiny-python-llama"
    default_cache = Path(tempfile.gettempdir()) / "tiny-python-llama-cache"
    parser.add_argument("--architecture", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--minutes", type=float, default=78.0, help="training time (default: 78)")
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the model")
    parser.add_argument("--cache", type=Path, default=default_cache, help="folder for tokenizer and tokens")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens a step, a multiple of 4096")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adamw-rate", type=float, default=0.004)
    parser.add_argument("--short-share", type=float, default=0.6, help="share of time on half-length sequences")
    parser.add_argument("--checkpoint-minutes", type=float, default=8.0)
    parser.add_argument("--tokenizer-bytes", type=int, default=20_000_000, help="text the tokenizer is trained on")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Trains and writes the model."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    torch.manual_seed(arguments.seed)
    text = prepare(arguments.cache, arguments.seed, arguments.tokenizer_bytes)
    tokens = np.load(arguments.cache / "tokens.npy")
    rows = np.load(arguments.cache / "rows.npy")
    tokenizer = Tokenizer.from_file(str(arguments.cache / "tokenizer.json"))
    sizes = token_bytes(tokenizer)
    print(
        f"{len(tokens) / 1e6:.1f} Mtokens, {text['tokens_one_pass'] / 1e6:.1f} Mtokens a pass, "
        f"{sizes[tokens[:1_000_000]].mean():.3f} bytes a token",
        flush=True,
    )
    test = held_out_sequences(tokenizer, "test", 128)
    AttentionInterface.register("grouped", grouped_attention)
    model = new_model(arguments.architecture)
    model.set_attn_implementation("grouped")
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def checkpoint(tokens_seen: int, minutes: float) -> None:
        save(model, arguments.cache, arguments.out)
        loss = held_out_loss(model, test, sizes)
        print(
            f"checkpoint  {minutes:.1f} min  {tokens_seen / 1e6:.2f} Mtokens  held-out test "
            f"{loss['nats_per_token']:.4f} nats/token  {loss['bits_per_byte']:.4f} bits/byte",
            flush=True,
        )

    run = train(model, Batches(tokens, rows, arguments.seed), arguments, checkpoint)
    checkpoint(int(run["tokens"]), run["minutes"])
    saved = type(model).from_pretrained(arguments.out, dtype=torch.float32)
    loaded = AutoTokenizer.from_pretrained(arguments.out)
    sample = "def main(self):\n    return __name__\n\n\nclass A:\n\tpass  # é\n"
    if loaded(sample)["input_ids"] != tokenizer.encode(sample).ids or loaded.decode(loaded.encode(sample)) != sample:
        raise RuntimeError("the saved tokenizer does not give the ids that the model was trained on")
    config = model.config
    held_out = {split: held_out_loss(saved, held_out_sequences(tokenizer, split, 256), sizes) for split in HELD_OUT}
    names = ("batch_tokens", "muon_rate", "adamw_rate", "short_share", "tokenizer_bytes")
    record = {
        "model_type": arguments.architecture,
        "parameters": parameters,
        "architecture": (
            f"{config.num_hidden_layers} layers, width {config.hidden_size}, "
            f"{config.num_attention_heads} query heads and {config.num_key_value_heads} key-value heads "
            f"of {config.head_dim}, feed-forward width {config.intermediate_size}, tied embeddings, "
            f"context {config.max_position_embeddings}"
        ),
        "held_out": held_out,
        "run": {**run, "tokens_per_second": run["tokens"] / run["minutes"] / 60},
        "hyperparameters": {name: getattr(arguments, name) for name in names},
        "seed": arguments.seed,
        "hardware": f"{arguments.threads} CPU threads, shared with other work",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "text": text,
    }
    write_card(arguments.out, record)
    print(json.dumps({"held_out": held_out, "run": record["run"]}), flush=True)


if __name__ == "__main__":
    main()
