"""What is read from disk is data, what it names stays in its folder, and no secret is written down."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import allocator
from allocator.core.errors import UserError
from allocator.core.files import check_name
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.pruning.levels.store import open_store

ROOT = Path(allocator.__file__).parent
UNPICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pandas"}
RUNS_CODE = {"eval", "exec", "compile", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "os.system"}
OUTSIDE = ["../../x", "/etc/x", "..", ".hidden", "a/b", "a\\b", "a\0b", ""]
SMALL = [
    "tokens.sequence_length=64",
    "tokens.calibration=512",
    "tokens.selection=256",
    "tokens.test=512",
    "search.method=evolution",
    "search.evolution.generations=2",
    "search.evolution.tokens=[128]",
    "search.evolution.survivors=[1]",
]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_is_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            loaded = {module.split(".")[0] for module in modules}
            if path.relative_to(ROOT).as_posix() == "commands/open_run.py":
                loaded -= {"pandas"}  # it makes a table of what was read, and reads nothing with it
            assert not UNPICKLES & loaded
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in RUNS_CODE
        assert given.get("shell", "False") == "False"
        assert given.get("trust_remote_code", "False") == "False"
        if called.split(".")[-1] == "from_pretrained" and "Auto" in called:
            assert given["trust_remote_code"] == "False", "or transformers asks on the terminal"
        if called == "torch.load":  # of other tools' levels, which say in such a file what they mean
            assert given["weights_only"] == "True"
            assert path.relative_to(ROOT).as_posix() == "interop/readers/levels.py"
        if called in ("np.load", "numpy.load"):
            assert given["allow_pickle"] == "False"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_elsewhere(name: str) -> None:
    with pytest.raises(UserError, match="is not a name of a module"):
        check_name(name, "file")
    check_name("model.layers.0.mlp", "file")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_folder: Path) -> Path:
    """A finished run, made in an environment that holds secrets, on a cluster of which nobody shall know."""
    folder = tmp_path_factory.mktemp("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_verysecret")
        patch.setenv("RAY_AUTH_TOKEN", "verysecret" * 4)
        given = {"text": text_folder, "workers": 0, "runs_dir": folder, "name": "run", "settings": SMALL}
        return allocator.search(tiny_model, address="ray://user:verysecret@head.internal:10001", **given).folder


def test_no_secret_and_no_address_is_written(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"run.yaml", "journal.jsonl", "status.json", "plan.json", "result.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert b"verysecret" not in content, path
        assert b"head.internal" not in content, path


@pytest.mark.parametrize("name", ["../../x", "/etc/x"])
def test_plan(run: Path, tmp_path: Path, name: str) -> None:
    data = json.loads((run / "plan.json").read_text())
    first = next(iter(data["units"]))
    data["units"] = {name if unit == first else unit: value for unit, value in data["units"].items()}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{tmp_path / 'plan.json'}: '{name}' is not a name"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["../../x", "/etc/x"])
def test_journal(run: Path, tmp_path: Path, name: str) -> None:
    header, *rest = (run / "journal.jsonl").read_text().splitlines()
    data = json.loads(header)
    data["space"]["units"][0]["name"] = name
    (tmp_path / "journal.jsonl").write_text("\n".join([json.dumps(data), *rest]) + "\n")
    with pytest.raises(UserError, match=f"'{name}' is not a name"):
        _ = Journal.read(tmp_path / "journal.jsonl").space


@pytest.mark.parametrize("name", ["../x", "/etc/x"])
def test_level_store(run: Path, tmp_path: Path, name: str) -> None:
    """Even where there is such a file, of the right hash."""
    store = Path(shutil.copytree(run / "levels", tmp_path / "inner" / "levels"))
    manifest = json.loads((store / "manifest.json").read_text())
    unit, hashed = manifest["units"].popitem()
    (store / f"{unit}.safetensors").rename(tmp_path / "inner" / "x.safetensors")
    manifest["units"][name] = hashed
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"'{name}' is not a name"):
        open_store(store, manifest["key"])


def test_index_of_a_model(tmp_path: Path, tiny_model: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "inner" / "model"))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"x": "../../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"'../../x.safetensors' is not a name"):
        read_checkpoint(model)
