import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import PACKAGED, locate, read_checkpoint


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_headers_are_those_of_the_tensors(folder):
    checkpoint = read_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(checkpoint.dtypes.values()) == {"F32"}
    assert checkpoint.architecture == "LlamaForCausalLM"


def test_shards_are_read_through_the_index(make_model):
    whole, sharded = (read_checkpoint(make_model(shards=shards, seed=4)) for shards in (False, True))
    assert len(set(sharded.shards.values())) > 1
    assert sharded.shapes == whole.shapes


def test_tied_tensors_count_once(folder):
    before = read_checkpoint(folder).shapes
    tensors = load_file(folder / "model.safetensors")
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tied, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_checkpoint(folder).shapes == before


def test_the_fingerprint_covers_configuration_and_weights_and_not_the_place(folder, tiny_model):
    first = read_checkpoint(folder).fingerprint
    assert first == read_checkpoint(tiny_model).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    second = read_checkpoint(folder).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    third = read_checkpoint(folder).fingerprint
    assert len({first, second, third}) == 3


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_checkpoint(tmp_path / "nowhere")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere-at-all", "nowhere"):
        with pytest.raises(UserError, match="no such folder"):
            locate(name)


def test_places(folder):
    assert locate(str(folder)) == folder
    assert locate(PACKAGED).name == PACKAGED
    with pytest.raises(UserError, match="no such folder"):
        locate(folder / "config.json")


def test_a_folder_without_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        (["BertForPreTraining"], "'BertForPreTraining', which cannot be pruned"),
        ([], "the kind of model is unknown"),
        (None, "the kind of model is unknown"),
        (["LlamaForTokenClassification"], "'LlamaForTokenClassification', which cannot be pruned"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(folder, architectures, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(UserError, match=said):
        read_checkpoint(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(folder, share):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        read_checkpoint(folder)


def test_weights_of_another_format_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        read_checkpoint(folder)


def test_a_shard_that_the_index_names_must_be_there(make_model, tmp_path):
    folder = shutil.copytree(make_model(shards=True), tmp_path / "model")
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(UserError, match=missing.name):
        read_checkpoint(folder)


def test_a_configuration_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable model configuration"):
        read_checkpoint(folder)
