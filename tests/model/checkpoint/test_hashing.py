import pytest
import torch
from safetensors.torch import save_file

from allocator.core.errors import UserError
from allocator.core.files import file_fingerprint
from allocator.model.checkpoint import hashing as weights
from allocator.model.checkpoint.hashing import fingerprint_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _extremes(dtype):
    found = torch.finfo(dtype)
    return torch.tensor([found.max, found.min, found.tiny, found.smallest_normal / 2, 0.0, -0.0, 1.0], dtype=dtype)


@pytest.mark.parametrize("chunk", [8, 16, 1 << 20])
def test_the_fingerprint_is_that_of_the_bytes(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(weights, "_CHUNK_BYTES", chunk)
    tensors = {str(dtype): _extremes(dtype) for dtype in DTYPES}
    tensors |= {"a scalar": torch.tensor(2.0), "nothing": torch.empty(0), "mask": torch.full((5,), -1)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    assert fingerprint_weights(path) == file_fingerprint(path)


@pytest.mark.parametrize("chunk", [8, 1 << 20])
@pytest.mark.parametrize("place", [0, 11, 29])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_that_is_not_finite_is_named(tmp_path, monkeypatch, dtype, value, place, chunk):
    monkeypatch.setattr(weights, "_CHUNK_BYTES", chunk)
    tensors = {name: torch.ones(5, 6, dtype=dtype) for name in ("first", "second", "third")}
    tensors["second"].view(-1)[place] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: second holds NaN or infinity\. Repair or replace"):
        fingerprint_weights(tmp_path / "model.safetensors")
