import json

import pytest
import torch
from forked import Python
from stores import create_store

from allocator.core.errors import UserError
from allocator.pruning.levels import store as stores
from allocator.pruning.levels.store import MANIFEST, StoreBuilder, open_store

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
    assert [path.name for path in tmp_path.iterdir()] == ["levels"]


def test_two_may_begin_at_the_same_moment(tmp_path, monkeypatch):
    write_json = stores.write_json

    def slow(path, value):
        monkeypatch.setattr(stores, "write_json", write_json)
        StoreBuilder(tmp_path / "levels", KEY).write("layers.0.mlp", LEVELS["layers.0.mlp"])
        write_json(path, value)

    monkeypatch.setattr(stores, "write_json", slow)
    assert "layers.0.mlp" in StoreBuilder(tmp_path / "levels", KEY)


def test_what_was_begun_for_the_same_key_is_gone_on_with(tmp_path):
    names = list(LEVELS)
    builder = StoreBuilder(tmp_path / "levels", KEY)
    builder.write(names[0], LEVELS[names[0]])
    again = StoreBuilder(tmp_path / "levels", KEY)
    assert [name in again for name in names] == [True, False, False]
    assert again(names[1]) is None
    assert all(torch.equal(tensor, LEVELS[names[0]][key]) for key, tensor in again(names[0]).items())


def test_stores_for_different_keys_under_one_name_do_not_mix(tmp_path):
    one, two = (StoreBuilder(tmp_path / "levels", {**KEY, "pruner": f"sha256:{name}"}) for name in "xy")
    one.write("layers.0.mlp", LEVELS["layers.0.mlp"])
    assert "layers.0.mlp" not in two
    two.write("layers.0.mlp", {"order": torch.zeros(3)})
    assert torch.equal(one("layers.0.mlp")["order"], LEVELS["layers.0.mlp"]["order"])
    one.finish(["layers.0.mlp"])
    with pytest.raises(UserError, match="built for another pruner"):
        two.finish(["layers.0.mlp"])


def test_two_processes_may_build_one_store(tmp_path):
    one, two = (StoreBuilder(tmp_path / "levels", KEY) for _ in range(2))
    for name, tensors in LEVELS.items():
        one.write(name, tensors)
    two.write("layers.0.mlp", LEVELS["layers.0.mlp"])
    one.finish(LEVELS)
    two.write("layers.1.mlp", LEVELS["layers.1.mlp"])
    assert two.finish(LEVELS).folder == tmp_path / "levels"


def test_a_full_disk_says_what_to_do_and_keeps_what_was_written(tmp_path):
    """A limit on the size of files fails a write as a full disk does: half-way."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from allocator.core.errors import UserError
from allocator.pruning.levels.store import StoreBuilder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
builder = StoreBuilder(Path({str(tmp_path / "levels")!r}), {KEY!r})
builder.write("small", {{"a": torch.ones(4)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    builder.write("large", {{"a": torch.ones(1 << 16)}})
except UserError as error:
    print(error)
"""
    done = Python(["-c", code])
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert "the level store cannot be written" in out
    assert "Free some space and resume" in out
    builder = StoreBuilder(tmp_path / "levels", KEY)
    assert ["small" in builder, "large" in builder] == [True, False]
    (partial,) = tmp_path.glob(".levels.*.partial")
    assert sorted(path.name for path in partial.iterdir()) == ["key.json", "small.safetensors"]


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
