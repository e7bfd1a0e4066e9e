import json
import shutil

import pytest
import torch

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.live.load import load_encoder, load_model


def test_models_come_frozen_in_the_data_type_asked_for(tiny_model_bf16):
    model = load_model(read_checkpoint(tiny_model_bf16))
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    stored = read_checkpoint(tiny_model_bf16)
    assert set(stored.dtypes.values()) == {"BF16"}


def test_an_architecture_that_transformers_lacks_is_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LamaForCausalLM"]}))
    with pytest.raises(UserError, match="has no LamaForCausalLM"):
        load_model(read_checkpoint(folder))


def test_the_tokenizer_adds_nothing_and_knows_its_separator(tiny_model, tokenizer):
    encode, separator = load_encoder(tiny_model)
    text = "def plan(x):\n    return x\n"
    assert tokenizer.decode(encode(text)) == text
    assert separator == tokenizer.eos_token_id
    assert separator not in encode(text)


def test_a_folder_without_a_tokenizer_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="no readable tokenizer"):
        load_encoder(folder)


def test_a_tokenizer_without_a_separator_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="neither an end-of-text nor a begin-of-text token"):
        load_encoder(folder)


def test_a_missing_tensor_is_an_error(make_model, tmp_path):
    """Else transformers would draw it anew, in every worker another."""
    from safetensors.torch import load_file, save_file

    folder = make_model("llama", tie_word_embeddings=False)
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, first model\.norm\.weight"):
        load_model(read_checkpoint(copy))
