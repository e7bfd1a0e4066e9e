"""What travels with a job: all that is needed, nothing else, and nothing that is too large."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from allocator.core.errors import UserError
from allocator.run import job_package as parcel
from allocator.run.config.load import validate
from allocator.run.job_package import COMMAND, JobPackage, pack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A working folder with all that a run file may name, and what must stay at home."""
    folder = tmp_path / "here"
    shutil.copytree(tiny_model, folder / "model")
    (folder / "model" / "optimizer.pt").write_bytes(b"not read")
    for name in ("text/a.txt", "text/inner/b.md", "text/picture.png", "other.txt", "family.yaml", "latency.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (".git/config", "runs/old/plan.json", "secrets.env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays")
    monkeypatch.chdir(folder)
    return folder


def keys(**more: Any) -> dict[str, Any]:
    return {"runs_dir": "/shared/runs", **more}


def run_file(sent: JobPackage) -> Any:
    content = sent.files["run.yaml"]
    assert isinstance(content, bytes)
    return yaml.safe_load(content)


def test_only_what_is_needed_travels(here: Path) -> None:
    sent = pack(keys(model="model", text="text", family="family.yaml"), installed=True)
    inputs = {name for name in sent.files if name != "run.yaml"}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert inputs == {
        *(f"inputs/model/model/{name}" for name in model),
        "inputs/text/text/a.txt",
        "inputs/text/text/inner/b.md",
        "inputs/family/family.yaml",
    }


def test_all_of_the_package_travels() -> None:
    """But not the packaged model, where it is not used."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "allocator").rglob("*") if path.is_file()}
    needed = {name for name in found if not name.endswith((".md", ".pyc"))}
    families = {f"allocator/search_spaces/{path.name}" for path in (ROOT / "search_spaces").glob("*.yaml")}
    assert {*pack(keys()).files} == needed | families | {"run.yaml"}
    other = {*pack(keys(model="some/model")).files}
    assert other == {name for name in needed if "/packaged/" not in name} | families | {"run.yaml"}


def test_what_was_sent_runs_from_its_folder(tmp_path: Path) -> None:
    pack(keys()).write(tmp_path / "package.zip")
    zipfile.ZipFile(tmp_path / "package.zip").extractall(tmp_path / "job")
    families = "allocator.model.family.schema"
    script = f"import allocator, {families} as f; print(allocator.__file__, *f.find_families_folder().iterdir())"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "job",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    inside = tmp_path / "job" / "allocator"
    package, *families = done.stdout.split()
    assert package == str(inside / "__init__.py")
    shipped = (ROOT / "search_spaces").glob("*.yaml")
    assert sorted(families) == sorted(str(inside / "search_spaces" / path.name) for path in shipped)
    assert COMMAND.split()[:4] == ["python", "-m", "allocator", "search"]


def test_paths_are_those_of_the_job(here: Path) -> None:
    given = keys(
        model="./model",
        domains={"one": "text", "two": "../here/other.txt"},
        workload={"latency": "latency.json"},
        pruner={"inputs": "path", "along": "/shared/plan.json"},
        seed=3,
    )
    sent = pack(given, installed=True)
    read = run_file(sent)
    assert read == {
        **given,
        "model": "inputs/model/model",
        "domains": {"one": "inputs/domains.one/text", "two": "inputs/domains.two/other.txt"},
        "workload": {"latency": "inputs/workload.latency/latency.json"},
        "name": "model-structured-0.5-seed3",
    }
    assert {"inputs/domains.two/other.txt", "inputs/workload.latency/latency.json"} <= sent.files.keys()
    assert validate(read).identity() == sent.config.identity()
    assert given["model"] == "./model", "what is given is not changed"


@pytest.mark.parametrize("model", ["/shared/model", "~/model", "some/model", "tiny-python-llama"])
def test_what_the_cluster_has_stays_as_it_is(here: Path, model: str) -> None:
    sent = pack(keys(model=model, text="/shared/text"), installed=True)
    assert [*sent.files] == ["run.yaml"]
    assert (run_file(sent)["model"], run_file(sent)["text"]) == (model, "/shared/text")


def test_what_is_not_said_is_for_the_cluster_to_say() -> None:
    assert run_file(pack(keys())).keys() == {"runs_dir", "name"}


def test_a_parcel_has_the_size_and_the_bytes_that_it_should(here: Path) -> None:
    for number in (1, 2):
        sent = pack(keys(model="model", text="text"))
        sent.write(here / f"{number}.zip")
        assert (here / f"{number}.zip").stat().st_size == sent.size_bytes
    assert (here / "1.zip").read_bytes() == (here / "2.zip").read_bytes()


def test_too_large(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "MAX_BYTES", 2**20)
    (here / "text" / "large.txt").write_bytes(b"x" * (3 * 2**20 // 2))
    with pytest.raises(UserError, match=r"1\.6 MiB would be sent, and Ray takes 1\.") as refusal:
        pack(keys(model="model", text="text"), installed=True)
    lines = str(refusal.value).splitlines()
    assert lines[1].split() == ["1.5", "MiB", "text/large.txt"]
    assert "absolute path" in lines[0]


def test_environment_is_what_the_run_file_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sent = pack(keys(threads=3))
    assert sent.variables == {"OMP_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "false"}
    assert not [name for name, content in sent.files.items() if isinstance(content, bytes) and b"secret" in content]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs_dir": "runs"}, "runs_dir: runs is relative.*--runs-dir"),
        ({"store": "levels"}, "store: levels is relative.*--set store="),
        ({"address": "auto"}, "address: a job runs on the cluster that it is submitted to"),
        ({"model": "gone"}, "model: gone: no such folder here"),
        ({"model": "./gone"}, "model: ./gone: no such folder here"),
        ({"text": "gone.txt"}, "text: gone.txt: no such file or folder here"),
        ({"text": "."}, r"text: \.git/config|text: runs/old|never sent"),
        ({"pruner": {"along": "gone.json"}}, "pruner.along: gone.json: no such file"),
        ({"taget": 0.5}, "unknown key 'taget'"),
        ({"pruner": {"dampin": 0.5}}, "unknown key 'pruner.dampin'"),
    ],
)
def test_refused(here: Path, given: dict[str, Any], message: str) -> None:
    (here / "runs" / "notes.md").write_text("text that must not travel")
    with pytest.raises(UserError, match=message):
        pack(keys(**given))


def test_another_search_of_the_name_is_refused_before_anything_is_sent(here: Path, tmp_path: Path) -> None:
    """As far as its settings tell; places and numbers of workers may differ."""
    runs = tmp_path / "shared"
    config = pack(keys(runs_dir=str(runs), name="mine")).config
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "run.yaml").write_text(config.to_yaml())
    assert pack(keys(runs_dir=str(runs), name="mine", workers=7)).config.workers == 7
    with pytest.raises(UserError, match=r"mine: holds another search: its seed is 0, and this one's is 1\. Submit"):
        pack(keys(runs_dir=str(runs), name="mine", seed=1))
