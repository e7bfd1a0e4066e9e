"""Reading examples that are more than text, and refusing what a model cannot read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from allocator.core.errors import UserError
from allocator.core.files import fingerprint
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.data.read import read_examples
from allocator.model.data.text import choose_split

COUNTS = {"calibration": 6 * 32, "search": 32, "test": 2 * 32}
PREPARED = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
KINDS = ("bird", "cat", "dog")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of 120 images of one colour each, in folders named after three classes."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(120):
        path = folder / KINDS[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (number, 2 * number, 255 - number)).save(path)
    return folder


@pytest.fixture
def seeing(make_other, tmp_path):
    """Returns the files of a model that sees, in a folder of its own, with what prepares images."""

    def make(architecture="ViTModel", **overrides):
        folder = tmp_path / architecture
        shutil.copytree(make_other(architecture, **overrides), folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED))
        return read_checkpoint(folder)

    return make


def test_images_are_split_by_name_and_prepared(seeing, images):
    examples = read_examples(images, seeing(), COUNTS, 32)
    assert {split: (len(each), each.length) for split, each in examples.items()} == {
        "calibration": (6, 32),
        "search": (1, 32),
        "test": (2, 32),
    }
    colours = {(number, 2 * number, 255 - number): f"{KINDS[number % 3]}/{number}.png" for number in range(120)}
    for split, each in examples.items():
        assert {*each.arrays} == {"pixel_values"}
        for image in each.arrays["pixel_values"]:
            assert image.shape == (3, 16, 16)
            assert float(np.ptp(image, axis=(1, 2)).max()) < 1e-6
            colour = tuple(int(c) for c in np.round((image[:, 0, 0] * 0.5 + 0.5) * 255))
            assert choose_split(colours[colour]) == split


def test_folders_are_labels_for_a_model_that_classifies(seeing, images):
    names = {name: number for number, name in enumerate(KINDS)}
    checkpoint = seeing("ViTForImageClassification", label2id=names, id2label={v: k for k, v in names.items()})
    examples = read_examples(images, checkpoint, COUNTS, 32)["calibration"]
    numbers = np.round((examples.arrays["pixel_values"][:, 0, 0, 0] * 0.5 + 0.5) * 255)
    assert examples.arrays["labels"].tolist() == (numbers % 3).astype(int).tolist()


def test_pairs_are_images_with_padded_texts(seeing, images, tmp_path):
    checkpoint = seeing("CLIPModel")
    tokenizer = json.loads((checkpoint.folder / "tokenizer_config.json").read_text())
    (checkpoint.folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "pad_token": "<|end|>"}))
    paths = sorted(images.rglob("*.png"))
    lines = [json.dumps({"image": str(p.relative_to(images)), "text": f"{p.parent.name} of {p.stem}"}) for p in paths]
    (images / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    examples = read_examples(images / "pairs.jsonl", checkpoint, COUNTS, 32)
    assert {name: array.shape for name, array in examples["calibration"].arrays.items()} == {
        "input_ids": (6, 12),
        "pixel_values": (6, 3, 16, 16),
    }
    (images / "pairs.jsonl").write_text('{"image": "nothing.png", "text": "a"}')
    with pytest.raises(UserError, match=r"line 1: .*nothing\.png does not exist"):
        read_examples(images / "pairs.jsonl", checkpoint, COUNTS, 32)
    (images / "pairs.jsonl").write_text('{"picture": "nothing.png", "text": "a"}')
    with pytest.raises(UserError, match=r"line 1 needs strings under the keys .*found \['picture', 'text'\]"):
        read_examples(images / "pairs.jsonl", checkpoint, COUNTS, 32)


def test_short_documents_are_left_out_with_a_word(make_other, labelled):
    checkpoint, heard = read_checkpoint(make_other("BertForSequenceClassification", num_labels=3)), []
    examples = read_examples(labelled, checkpoint, {"calibration": 320, "test": 64}, 32, heard.append)["calibration"]
    assert examples.arrays["input_ids"].shape == (10, 32)
    assert {*examples.arrays["labels"].tolist()} <= {0, 1, 2}
    (message,) = heard
    assert "80 of 400 documents are shorter than 32 tokens" in message
    assert "tokens.sequence_length" in message


def test_text_for_encoders_begins_with_the_token_that_classifies(make_other, text_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_other("BertModel"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    plain = read_examples(text_folder, read_checkpoint(folder), {"test": 64}, 32)["test"].inputs["input_ids"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "cls_token": "<|end|>"}))
    begun = read_examples(text_folder, read_checkpoint(folder), {"test": 64}, 32)["test"].inputs["input_ids"]
    assert begun.shape == (2, 32)
    assert {*begun[:, 0]} == {0}
    assert begun[0, 1:].tolist() == plain[0, :-1].tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((9, 3, 16, 16))}, r"no array pixel_values, found \['pixels'\]"),
        ({"pixel_values": np.zeros((9, 3, 8, 8))}, r"shape \[3, 8, 8\] for each image, and .* expects \[3, 16, 16\]"),
        ({"pixel_values": np.full((9, 3, 16, 16), np.nan)}, "not finite"),
        ({"pixel_values": np.zeros((9, 3, 16, 16)), "labels": np.full(9, 5)}, "label '5', which is no class"),
        ({"pixel_values": np.zeros((9, 3, 16, 16)), "labels": np.zeros(8, int)}, "different numbers of rows"),
        ({"pixel_values": np.zeros((9, 3, 16, 16))}, r"calibration split: .*100 examples are needed, .* holds"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(make_other, tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    checkpoint = read_checkpoint(make_other("ViTForImageClassification", num_labels=5))
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / "data.npz", checkpoint, {"calibration": 3200}, 32)


def test_what_a_model_does_not_read_is_refused(make_other, text_folder, images, pixels, tmp_path):
    bert, vit = (read_checkpoint(make_other(name)) for name in ("BertModel", "ViTModel"))
    with pytest.raises(UserError, match=r"BertModel reads text, and .*pixels\.npz is not text"):
        read_examples(pixels, bert, COUNTS, 32)
    with pytest.raises(UserError, match="ViTModel reads images, and none is named"):
        read_examples(None, vit, COUNTS, 32)
    with pytest.raises(UserError, match=r"ViTModel reads images, and .* holds none"):
        read_examples(text_folder, vit, COUNTS, 32)
    with pytest.raises(UserError, match=r"images cannot be prepared: .*preprocessor_config\.json"):
        read_examples(images, vit, COUNTS, 32)
    (tmp_path / "data.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"not a readable \.npz file"):
        read_examples(tmp_path / "data.npz", vit, COUNTS, 32)


def test_a_damaged_image_is_named(seeing, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"\.png: not a readable image"):
        read_examples(folder, seeing(), COUNTS, 32)


def test_examples_are_cut_and_counted_as_token_ids_are():
    arrays = {"pixel_values": np.arange(20.0).reshape(5, 4), "labels": np.arange(5)}
    examples, tokens = Examples(arrays, 8), np.zeros((5, 8), np.int64)
    assert (len(examples), examples.length, examples.num_tokens) == (*tokens.shape, tokens.size)
    tensors = examples.to_tensors()
    assert isinstance(tensors, Examples)
    assert tensors.num_tokens == Examples.from_ids(tokens).to_tensors().num_tokens
    assert [(len(each), each.length) for each in tensors.split(2)] == [
        each.shape for each in torch.zeros(5, 8).split(2)
    ]
    assert tensors[1:3].arrays["labels"].tolist() == [1, 2]
    assert examples.fingerprint() == Examples({k: v.copy() for k, v in arrays.items()}, 8).fingerprint()
    assert examples.fingerprint() != Examples({**arrays, "labels": np.arange(5)[::-1]}, 8).fingerprint()


def test_plain_text_has_the_hash_of_its_ids_and_is_cut_to_its_first_tokens():
    ids = np.arange(40).reshape(5, 8)
    text = Examples.from_ids(ids)
    assert text.fingerprint() == fingerprint(ids.tolist())
    assert text.first_tokens(3).inputs["input_ids"].tolist() == ids[:, :3].tolist()
    pixels = Examples({"pixel_values": np.zeros((5, 3, 4, 4))}, 8)
    assert pixels.first_tokens(3) is pixels
