"""Reading examples: windows of text, documents with labels, images, or images with text. Names decide the split.

Every example counts as ``length`` tokens. A number of tokens, for a split or a fidelity, is thus a number of examples.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from allocator.core.errors import UserError
from allocator.core.notify import Notify, silent
from allocator.model.checkpoint.headers import PACKAGED, Checkpoint, locate
from allocator.model.data.examples import LABELS, Examples
from allocator.model.data.text import LIBRARY, choose_split, parse_json_line, read_documents, sort_by_hash
from allocator.model.data.windows import Passages
from allocator.model.live.load import load_encoder, load_tokenizer

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Item:
    """One example before it is converted to arrays: its name, its content and its label as written."""

    name: str
    content: Any
    label: str | None = None


def read_examples(
    path: Path | None,
    checkpoint: Checkpoint,
    wanted: Mapping[str, int],
    length: int,
    notify: Notify = silent,
) -> dict[str, Examples]:
    """Read examples in the form that the kind of the model needs.

    Args:
        path: Where the examples are. It depends on the input of the model:

            - text: see :func:`~allocator.model.data.text.read_documents`. A model that classifies takes labels from the
              key ``label`` of a .jsonl file.
            - images: a folder of images, or an .npz file of ``pixel_values`` and perhaps ``labels``. For a model that
              classifies, the names of the folders inside are the labels.
            - images with text: a .jsonl file, or an .npz file of ``pixel_values`` and ``input_ids``. Each line of the
              .jsonl file has the keys ``text`` and ``image``. The image is a path relative to the file's folder.
        checkpoint: The model.
        wanted: Tokens of each split, multiples of ``length``.
        length: Number of tokens that one example has, or counts as.
        notify: Called with a message if examples are left out.

    Raises:
        UserError: The data are of another kind or damaged, or a split holds too few examples.
    """
    kind = checkpoint.kind
    if kind.reads == "text" and path is not None and path.suffix in (".npz", *_IMAGES):
        raise UserError(
            f"text: {checkpoint.architecture} reads text, and {path} is not text. Give text, or another model"
        )
    if kind.reads == "text" and kind.answers != "classes":
        return read_tokens(path, checkpoint, wanted, length)
    counts = {split: tokens // length for split, tokens in wanted.items()}
    if kind.reads == "text":
        return _read_labelled(path, checkpoint, counts, length, notify)
    if path is None or not path.exists():
        what = "a folder of images" if kind.reads == "images" else 'a .jsonl file whose lines have "image" and "text"'
        found = "none is named" if path is None else f"{path} does not exist"
        raise UserError(
            f"text: {checkpoint.architecture} reads {kind.words}, and {found}. Name {what}, or an .npz file"
        )
    if path.suffix == ".npz":
        return _read_arrays(path, checkpoint, counts, length)
    if kind.reads == "images":
        return _read_images(path, checkpoint, counts, length)
    return _read_pairs(path, checkpoint, counts, length)


def read_tokens(
    text: Path | None, checkpoint: Checkpoint, wanted: Mapping[str, int], length: int
) -> dict[str, Examples]:
    """Read text, and take the windows of every split; see :mod:`~allocator.model.data.windows`.

    Args:
        text: Where the text is. None for the Python standard library, on which the packaged model was trained.
        checkpoint: The model. Its tokenizer encodes the text. If the tokenizer has a classification token, every
            sequence begins with it, unless the model generates.
        wanted: Tokens of each split, multiples of ``length``. The split ``training`` reads the same documents as
            ``calibration``.
        length: Tokens per sequence.

    Raises:
        UserError: A split holds too few tokens, or no text is named for a model that is not the packaged one.
    """
    _require_text(text, checkpoint)
    encode, separator = load_encoder(checkpoint.folder)
    first = None if checkpoint.kind.generates else load_tokenizer(checkpoint.folder).cls_token_id
    passages = Passages(read_documents(text), length - (first is not None))
    examples = {}
    for split, count in wanted.items():
        source = "calibration" if split == "training" else split
        try:
            windows, coverage = passages.take(source, encode, count // length, separator)
        except UserError as error:
            raise UserError(f"{split} split: {error}") from None
        ids = windows if first is None else np.pad(windows, ((0, 0), (1, 0)), constant_values=first)
        examples[split] = replace(Examples.from_ids(ids), coverage={"": coverage})
    return examples


def _require_text(text: Path | None, checkpoint: Checkpoint) -> None:
    """Raise if no text is named for a model that is not the packaged one."""
    if text is None and checkpoint.folder.resolve() != locate(PACKAGED).resolve():
        raise UserError(
            "text: no text is named. Name a file or a folder with --text: some hundreds of documents like those that "
            f"the model will read. For the Python standard library, use --text {LIBRARY}"
        )


def _read_labelled(
    path: Path | None, checkpoint: Checkpoint, counts: Mapping[str, int], length: int, notify: Notify
) -> dict[str, Examples]:
    """Return one sequence per document, with labels if there are any. Shorter documents are left out."""
    _require_text(path, checkpoint)
    labels = _read_labels(path) if path is not None and path.is_file() and path.suffix == ".jsonl" else {}
    items = [Item(each.name, each.text, labels.get(each.name)) for each in read_documents(path)]
    tokenizer = load_tokenizer(checkpoint.folder)
    short = 0
    long: list[Item] = []
    for item in items:
        ids = tokenizer(item.content, truncation=True, max_length=length, verbose=False)["input_ids"]
        short += len(ids) < length
        if len(ids) == length:
            long.append(Item(item.name, ids, item.label))
    if short:
        notify(
            f"notice: {short} of {len(items)} documents are shorter than {length} tokens and left out. "
            "A smaller tokens.sequence_length takes more of them"
        )
    numbered = _number_labels(long, checkpoint, path)
    return _build_splits(numbered, counts, length, path, lambda own: {"input_ids": np.array([i.content for i in own])})


def _read_labels(path: Path) -> dict[str, str]:
    """Return the label, as written, of every labelled document of a .jsonl file."""
    labels = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        record = _parse_record(path, number, line)
        if record is not None and record.get("label") is not None:
            labels[f"{path.name}#{number}"] = str(record["label"])
    return labels


def _read_images(folder: Path, checkpoint: Checkpoint, counts: Mapping[str, int], length: int) -> dict[str, Examples]:
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES] if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"text: {checkpoint.architecture} reads images, and {folder} holds none ({', '.join(_IMAGES)}). "
            "Name a folder of images, or an .npz file of pixel_values"
        )
    items = []
    for path in paths:
        place = path.relative_to(folder)
        label = place.parts[0] if checkpoint.kind.answers == "classes" and len(place.parts) > 1 else None
        items.append(Item(place.as_posix(), path, label))
    prepare = _load_processor(checkpoint)
    return _build_splits(
        _number_labels(items, checkpoint, folder),
        counts,
        length,
        folder,
        lambda own: {"pixel_values": _load_pixels([item.content for item in own], prepare, checkpoint)},
    )


def _read_pairs(path: Path, checkpoint: Checkpoint, counts: Mapping[str, int], length: int) -> dict[str, Examples]:
    if path.suffix != ".jsonl":
        raise UserError(
            f"text: {checkpoint.architecture} reads images with text, and {path} is no .jsonl file. Write lines "
            '{"image": "a.jpg", "text": "..."}, with paths relative to the folder of the file, or give an .npz file'
        )
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        record = _parse_record(path, number, line)
        if record is None:
            continue
        image, text = record.get("image"), record.get("text")
        if type(image) is not str or type(text) is not str:
            raise UserError(
                f'text: {path}, line {number} needs strings under the keys "image" and "text" (found {sorted(record)})'
            )
        if not (path.parent / image).is_file():
            raise UserError(
                f"text: {path}, line {number}: {path.parent / image} does not exist. "
                "Paths are relative to the folder of the .jsonl file"
            )
        items.append(Item(f"{path.name}#{number}", (path.parent / image, text)))
    prepare, tokenizer = _load_processor(checkpoint), load_tokenizer(checkpoint.folder)
    longest = int(checkpoint.settings["text_config"]["max_position_embeddings"])
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model: {checkpoint.folder}: the tokenizer has no padding token, and text with images needs padding"
        )

    def make(own: Sequence[Item]) -> dict[str, np.ndarray]:
        # padding comes last and needs no mask: the model reads text causally, or was trained without a mask
        texts = [item.content[1] for item in own]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=longest)["input_ids"]
        return {
            "input_ids": np.array(ids, dtype=np.int64),
            "pixel_values": _load_pixels([item.content[0] for item in own], prepare, checkpoint),
        }

    return _build_splits([(item, None) for item in items], counts, length, path, make)


def _read_arrays(path: Path, checkpoint: Checkpoint, counts: Mapping[str, int], length: int) -> dict[str, Examples]:
    """Return the rows of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"text: {path}: not a readable .npz file ({error}). Write it with numpy.savez") from None
    needed = ["pixel_values"] if checkpoint.kind.reads == "images" else ["input_ids", "pixel_values"]
    if missing := [name for name in needed if name not in arrays]:
        raise UserError(
            f"text: {path} has no array {missing[0]}, found {sorted(arrays)}. {checkpoint.architecture} needs it"
        )
    labelled = LABELS in arrays and checkpoint.kind.answers == "classes"
    names = [*needed, *([LABELS] if labelled else [])]
    rows = {name: len(arrays[name]) for name in names}
    if len(set(rows.values())) > 1:
        raise UserError(f"text: {path}: arrays have different numbers of rows, {rows}")
    pixels = arrays["pixel_values"].astype(np.float32)
    _check_pixels(pixels, checkpoint, path)
    if "input_ids" in names:
        _check_ids(arrays["input_ids"], checkpoint, path)
    items = [
        Item(f"row#{number}", number, str(arrays[LABELS][number]) if labelled else None)
        for number in range(len(pixels))
    ]

    def make(own: Sequence[Item]) -> dict[str, np.ndarray]:
        chosen = [item.content for item in own]
        ids = {"input_ids": arrays["input_ids"][chosen].astype(np.int64)} if "input_ids" in names else {}
        return {**ids, "pixel_values": pixels[chosen]}

    return _build_splits(_number_labels(items, checkpoint, path), counts, length, path, make)


def _build_splits(
    items: Sequence[tuple[Item, int | None]],
    counts: Mapping[str, int],
    length: int,
    path: Path | None,
    make: Callable[[Sequence[Item]], dict[str, np.ndarray]],
) -> dict[str, Examples]:
    """Return the examples of every split, in the order of the hash of their names."""
    known = {item.name: number for item, number in items}
    ordered = sort_by_hash([item for item, _ in items])
    made = {}
    for split, count in counts.items():
        own = [item for item in ordered if choose_split(item.name) == split][:count]
        if len(own) < count:
            raise UserError(
                f"{split} split: text: {count} examples are needed, but {path} holds {len(own)}. Give more, or ask for "
                "fewer with --set tokens.calibration=N (or selection, or test). For the search split, set the tokens "
                f"of the search method. An example counts as {length} tokens (tokens.sequence_length)"
            )
        arrays = make(own)
        labels = [known[item.name] for item in own]
        if all(label is not None for label in labels):
            arrays[LABELS] = np.array(labels, dtype=np.int64)
        made[split] = Examples(arrays, length)
    return made


def _number_labels(items: Sequence[Item], checkpoint: Checkpoint, path: Path | None) -> list[tuple[Item, int | None]]:
    """Return items with the class numbers of their labels, for a model that classifies.

    Raises:
        UserError: A label is no class of the model, or some items have none.
    """
    if checkpoint.kind.answers != "classes" or all(item.label is None for item in items):
        return [(item, None) for item in items]
    classes = {str(name): int(number) for name, number in (checkpoint.settings.get("label2id") or {}).items()}
    numbers = {str(number): number for number in range(max([*classes.values(), -1]) + 1)}
    found: list[tuple[Item, int | None]] = []
    for item in items:
        label = item.label
        if label is None:
            raise UserError(f"text: {path}: {item.name} has no label, but others have one. Label all of them, or none")
        number = classes.get(label, numbers.get(label))
        if number is None:
            some = ", ".join(list(classes)[:12])
            raise UserError(
                f"text: {path}: {item.name} has the label {label!r}, which is no class of {checkpoint.architecture}. "
                f"The model has {len(classes)} classes: {some}"
            )
        found.append((item, number))
    return found


def _parse_record(path: Path, number: int, line: str) -> dict[str, Any] | None:
    """Return the object on a line of a .jsonl file; None for an empty line."""
    if not line.strip():
        return None
    record = parse_json_line(path, number, line)
    if not isinstance(record, dict):
        raise UserError(f"text: {path}, line {number} is no JSON object; put one on each line")
    return record


def _load_processor(checkpoint: Checkpoint) -> Callable[[list[Any]], np.ndarray]:
    """Return the function that turns images into pixels, as the model's preprocessor_config.json says."""
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model: {checkpoint.folder}: images cannot be prepared: {reason} Copy preprocessor_config.json into the "
            "folder and install Pillow, or give an .npz file of pixel_values"
        ) from None
    return lambda images: np.asarray(processor(images=images, return_tensors="np")["pixel_values"], dtype=np.float32)


def _load_pixels(
    paths: Sequence[Path], prepare: Callable[[list[Any]], np.ndarray], checkpoint: Checkpoint
) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    rows = []
    for path in paths:
        try:
            with Image.open(path) as image:
                rows.append(prepare([image.convert("RGB")]))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"text: {path}: not a readable image ({error}). Copy it again, or remove it") from None
    pixels = np.concatenate(rows)
    _check_pixels(pixels, checkpoint, checkpoint.folder / "preprocessor_config.json")
    return pixels


def _check_pixels(pixels: np.ndarray, checkpoint: Checkpoint, path: Path) -> None:
    vision = {**checkpoint.settings, **(checkpoint.settings.get("vision_config") or {})}
    channels, side = vision.get("num_channels", 3), vision["image_size"]
    expected = (channels, *(side if isinstance(side, (list, tuple)) else (side, side)))
    if pixels.ndim == 4 and pixels.shape[1] == channels and str(vision["model_type"]).startswith("dinov2"):
        return  # any size: positions are interpolated
    if pixels.shape[1:] != expected:
        raise UserError(
            f"text: {path} gives pixels of shape {list(pixels.shape[1:])} for each image, and "
            f"{checkpoint.architecture} expects {list(expected)}. Resize the images"
        )
    if not np.isfinite(pixels).all():
        raise UserError(f"text: {path} gives pixels that are not finite")


def _check_ids(ids: np.ndarray, checkpoint: Checkpoint, path: Path) -> None:
    text = checkpoint.settings["text_config"]
    longest, size = int(text["max_position_embeddings"]), int(text["vocab_size"])
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.shape[1] > longest:
        raise UserError(
            f"text: {path}: input_ids are {ids.dtype} of shape {list(ids.shape)}, and {checkpoint.architecture} reads "
            f"integers of shape [N, T] with T at most {longest}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        raise UserError(f"text: {path}: input_ids lie in [{ids.min()}, {ids.max()}], and the vocabulary has {size}")
