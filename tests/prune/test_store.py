import json

import pytest
import torch

from allocator.core.errors import UserError
from allocator.prune.store import MANIFEST, create_store, open_store

KEY = {"model": "sha256:a", "calibration": "sha256:b", "pruner": "sha256:c", "space": "sha256:d"}
LEVELS = {
    "layers.0.mlp": {"order": torch.tensor([2, 0, 1], dtype=torch.int32), "output.1": torch.randn(4, 2)},
    "layers.0.mlp.up_proj": {"mask.1": torch.zeros(3, dtype=torch.uint8), "values.1": torch.empty(0)},
    "layers.1.mlp": {"removed_at": torch.randint(0, 9, (4, 6), dtype=torch.uint8).T},
}


@pytest.fixture
def folder(tmp_path):
    create_store(tmp_path / "levels", KEY, LEVELS.items())
    return tmp_path / "levels"


def test_what_was_written_is_read(folder):
    store = open_store(folder, KEY)
    for unit, tensors in LEVELS.items():
        read = store(unit)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor)
            assert read[name].dtype == tensor.dtype


def test_a_part_of_the_key_is_enough_to_open(folder):
    assert open_store(folder, {"model": "sha256:a"}) is not None


@pytest.mark.parametrize("name", KEY)
def test_a_store_of_something_else_is_refused(folder, name):
    with pytest.raises(UserError, match=f"built for another {name}: {KEY[name]}, and this search needs sha256:x"):
        open_store(folder, {**KEY, name: "sha256:x"})


def test_there_is_no_store_before_it_is_finished(tmp_path):
    assert open_store(tmp_path / "levels", KEY) is None

    def broken():
        yield from LEVELS.items()
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        create_store(tmp_path / "levels", KEY, broken())
    assert open_store(tmp_path / "levels", KEY) is None
    create_store(tmp_path / "levels", KEY, list(LEVELS.items())[:1])
    assert sorted(path.name for path in (tmp_path / "levels").iterdir()) == ["layers.0.mlp.safetensors", MANIFEST]


def test_a_flipped_byte_is_found(folder):
    path = folder / "layers.1.mlp.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.safetensors: damaged.*Remove .* to have it built again"):
        open_store(folder, KEY)


def test_a_truncated_file_is_found(folder):
    path = folder / "layers.0.mlp.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.safetensors: damaged"):
        open_store(folder, KEY)


def test_a_missing_file_is_found(folder):
    (folder / "layers.0.mlp.safetensors").unlink()
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.safetensors: missing"):
        open_store(folder, KEY)


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"kind": "allocator.plan"}, {"key": "sha256:a"}, {"units": []}, {"units": None}]
)
def test_a_manifest_of_another_kind_is_refused(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match="not a level store of schema 1"):
        open_store(folder, KEY)


def test_a_truncated_manifest_is_refused(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="not a readable level store manifest"):
        open_store(folder, KEY)


@pytest.mark.parametrize("foreign", ["thesis.docx", "model.safetensors", "folder/"])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, foreign):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / foreign).mkdir() if foreign.endswith("/") else (folder / foreign).write_text("years of work")
    with pytest.raises(UserError, match=rf"not a level store, and it holds {foreign.rstrip('/')}"):
        create_store(folder, KEY, LEVELS.items())
    assert [path.name for path in folder.iterdir()] == [foreign.rstrip("/")]


def test_equal_levels_give_equal_bytes(folder, tmp_path):
    create_store(tmp_path / "again", KEY, LEVELS.items())
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
