"""The level store: every unit pruned at every level, on disk, ready to be assembled.

A folder with one safetensors file per unit and a manifest that says what the store belongs to and how each
file must hash. The manifest is written last, so a store without one is unfinished.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from allocator.core.errors import UserError
from allocator.core.files import check_place, file_fingerprint, read_json, write_json
from allocator.prune.assemble import CompactLevels

SCHEMA = 1
MANIFEST = "manifest.json"


class LevelStore:
    """A finished store, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._cache: dict[str, CompactLevels] = {}

    def __call__(self, unit: str) -> CompactLevels:
        """Return the compact levels of a unit."""
        if unit not in self._cache:
            with safe_open(self.folder / f"{unit}.safetensors", framework="pt") as file:
                self._cache[unit] = {key: file.get_tensor(key) for key in file.keys()}
        return self._cache[unit]


def create_store(folder: Path, key: Mapping[str, Any], levels: Iterable[tuple[str, CompactLevels]]) -> LevelStore:
    """Write a store, unit by unit; it appears under its name when it is whole.

    Args:
        folder: Where to.
        key: What the store belongs to: model, calibration, pruner, space.
        levels: Units by name with their compact levels.

    Raises:
        UserError: See :func:`check_free`.
    """
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    hashes: dict[str, str] = {}
    for unit, tensors in levels:
        path = partial / f"{unit}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        hashes[unit] = file_fingerprint(path)
    write_json(partial / MANIFEST, {"schema": SCHEMA, "kind": "allocator.levels", "key": dict(key), "units": hashes})
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if (built_meanwhile := open_store(folder, key)) is None:
            raise
        return built_meanwhile
    return LevelStore(folder)


def open_store(folder: Path, key: Mapping[str, Any]) -> LevelStore | None:
    """Open a finished store, or return None where there is none.

    Raises:
        UserError: The store belongs to another model, calibration or setting, or a file of it is damaged.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST, "level store manifest")
    remedy = f"Remove {folder} to have it built again, or name another with --set store=FOLDER"
    ours = manifest.get("kind") == "allocator.levels" and manifest.get("schema") == SCHEMA
    if not ours or not all(isinstance(manifest.get(name), dict) for name in ("key", "units")):
        raise UserError(f"{folder / MANIFEST}: not a level store of schema {SCHEMA}. {remedy}")
    for name, value in key.items():
        if manifest["key"].get(name) != value:
            raise UserError(
                f"{folder}: the level store was built for another {name}: {manifest['key'].get(name)}, "
                f"and this search needs {value}. {remedy}"
            )
    strays = sorted({path.stem for path in folder.glob("*.safetensors")} - set(manifest["units"]))
    if strays:
        raise UserError(f"{folder / MANIFEST}: damaged: it does not name {strays[0]}, which is there. {remedy}")
    for unit, expected in manifest["units"].items():
        path = folder / f"{unit}.safetensors"
        if not path.is_file():
            raise UserError(f"{path}: missing from the level store. {remedy}")
        if file_fingerprint(path) != expected:
            raise UserError(f"{path}: damaged: its hash is not the manifest's. {remedy}")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: not readable: {error}. {remedy}") from None
    return LevelStore(folder)


def check_free(folder: Path) -> None:
    """Check that a store can be written here: nothing is there, or an empty folder.

    Raises:
        UserError: The folder holds something, or cannot be written to.
    """
    remedy = "Name an empty or new folder with --set store=FOLDER"
    if folder.is_dir() and (found := next(folder.iterdir(), None)) is not None:
        raise UserError(f"{folder}: not a level store, and it holds {found.name}, which is not replaced. {remedy}")
    check_place(folder, remedy)
