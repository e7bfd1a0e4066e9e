"""What a job takes along to a cluster: the run file, what that names by relative paths, and this package.

Relative paths travel, absolute ones are the cluster's, and a model that is neither is a hub id or the packaged model.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import PACKAGED, list_model_files
from allocator.model.data.text import list_text_files, names_library
from allocator.model.family.schema import find_families_folder
from allocator.run.config.load import read_keys, validate
from allocator.run.config.run import RunConfig

RUN_FILE = "run.yaml"

COMMAND = f"python -m allocator search {RUN_FILE} --resume-or-begin"
"""What a job runs; run again, after a node was lost or by submitting again, it goes on."""

MAX_BYTES = 100 * 2**20
"""What Ray takes in one upload."""

_NEVER = {".git", "runs", "__pycache__"}
_CODE = {".py", ".json", ".j2", ".safetensors"}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class JobPackage:
    """What is sent.

    Attributes:
        config: What will be run, with paths as they are here.
        files: Content, or the file that has it, by its name in the job's working folder.
    """

    config: RunConfig
    files: Mapping[str, bytes | Path]

    @property
    def variables(self) -> dict[str, str]:
        """The environment that the run file asks for. Nothing of the environment here is in it, secrets least."""
        return {"OMP_NUM_THREADS": str(self.config.threads), "TOKENIZERS_PARALLELISM": "false"}

    @property
    def size_bytes(self) -> int:
        """Size of :meth:`write`'s file."""
        return 22 + sum(_size(content) + 76 + 2 * len(name.encode()) for name, content in self.files.items())

    def write(self, path: Path) -> None:
        """Write it as a zip file, whose bytes say nothing of when or where it was made."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)  # of 1980
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content if isinstance(content, bytes) else content.read_bytes())


def pack(keys: Mapping[str, Any], file: Path | None = None, *, installed: bool = False) -> JobPackage:
    """Check a configuration as far as it can be without the cluster, and return what its job takes along.

    Args:
        keys: As :func:`~allocator.run.config.read_keys` returns them.
        file: Where they are from.
        installed: Whether the cluster has this package.

    Raises:
        UserError: A key is wrong, a file is missing, a place is not shared, the run is there and is another search, or
            all of it is too large to send.
    """
    config = validate(keys, file)
    if config.address is not None:
        raise UserError("address: a job runs on the cluster that it is submitted to. Leave it out of the run file")
    for name, place in (("runs_dir", config.runs_dir), ("store", config.store)):
        if place is not None and not place.is_absolute():
            flag = "--runs-dir" if name == "runs_dir" else f"--set {name}="
            raise UserError(
                f"{name}: {place} is relative, and would be lost with the job's working folder. "
                f"Name a folder that all nodes share by its absolute path with {flag}"
            )
    _check_same(config)
    # the same keys, and not all that follow from them: what is not said is for the cluster to say
    sent = {**_plain(keys), "name": config.run_name}
    files: dict[str, bytes | Path] = {} if installed else dict(_package(config.model))
    for group, key, label in list(_places(sent)):
        named = Path(group[key])
        if named.is_absolute() or group[key].startswith("~") or (key == "model" and not _is_here(group[key])):
            continue
        if label == "text" and names_library(named):
            continue
        # a model is called after where it really lies, and a text file after what names it
        there = f"inputs/{label}/{named.name if named.is_file() else named.resolve().name}"
        files.update(_input(label, named, there))
        group[key] = there
    files[RUN_FILE] = yaml.safe_dump(sent, sort_keys=False).encode()
    parcel = JobPackage(config, files)
    if parcel.size_bytes > MAX_BYTES:
        largest = sorted(files.items(), key=lambda each: -_size(each[1]))[:_SHOWN]
        listed = "".join(
            f"\n  {_size(content) / 2**20:8.1f} MiB  {_origin(name, content)}" for name, content in largest
        )
        raise UserError(
            f"{parcel.size_bytes / 2**20:.1f} MiB would be sent, and Ray takes {MAX_BYTES / 2**20:.0f}. Put what is "
            "large on a file system that all nodes share, and name it by its absolute path there. The largest files:"
            f"{listed}"
        )
    return parcel


def _check_same(config: RunConfig) -> None:
    """Check that a run of the name, if its folder is seen from here, has these settings; the job compares the rest."""
    stored = config.folder / "run.yaml"
    if not stored.is_file():
        return
    theirs, own = (each.identity() for each in (validate(read_keys(stored, {}), stored), config))
    for key, value in own.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{config.folder}: holds another search: its {key} is {theirs.get(key)}, and this one's is {value}. "
                "Submit it with its own settings, or choose another --name"
            )


def _places(keys: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield every key that names a file or folder to read: its group, its name there, and in full."""
    groups: list[tuple[str, Any, list[str]]] = [
        ("", keys, ["model", "text", "family"]),
        ("domains.", keys.get("domains") or {}, list(keys.get("domains") or {})),
        ("workload.", keys.get("workload") or {}, ["latency"]),
        ("pruner.", keys.get("pruner") or {}, ["along"]),
    ]
    for prefix, group, names in groups:
        yield from ((group, name, f"{prefix}{name}") for name in names if group.get(name) is not None)


def _is_here(model: str) -> bool:
    """Whether a model that no absolute path names is a folder here; else it is the packaged one or of the hub."""
    if Path(model).is_dir():
        return True
    if model != PACKAGED and (model.startswith(".") or model.count("/") != 1):
        raise UserError(
            f"model: {model}: no such folder here. A relative path travels with the job; name what the cluster has "
            "by its absolute path, or by its hub id"
        )
    return False


def _input(label: str, named: Path, there: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of an input, by their names in the job's working folder."""
    if not named.exists():
        raise UserError(
            f"{label}: {named}: no such file or folder here. A relative path travels with the job; name what the "
            "cluster has by its absolute path"
        )
    if named.is_file():
        yield there, named
        return
    for path in list_model_files(named) if label == "model" else list_text_files(named):
        inside = path.relative_to(named)
        if _NEVER & set(inside.parts):
            raise UserError(
                f"{label}: {path}: what lies in a folder called {', '.join(sorted(_NEVER))} is never sent. "
                "Name a folder with the text alone"
            )
        yield f"{there}/{inside.as_posix()}", path


def _package(model: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of this package: its code, the families, and the packaged model if it is used."""
    root = Path(str(resources.files("allocator")))
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        wanted = path.suffix in _CODE and (model == PACKAGED or inside.parts[0] != "packaged")
        if wanted and not _NEVER & set(inside.parts):
            yield f"allocator/{inside.as_posix()}", path
    for path in sorted(find_families_folder().glob("*.yaml")):
        yield f"allocator/search_spaces/{path.name}", path


def _plain(value: Any) -> Any:
    """Return keys with paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _origin(name: str, content: bytes | Path) -> str:
    return name if isinstance(content, bytes) else str(content)
