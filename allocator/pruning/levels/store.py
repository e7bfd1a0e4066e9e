"""The level store: every unit pruned at every level, on disk, ready to be assembled.

A store is a folder with one safetensors file per unit, and a manifest. The manifest holds the hash of each file and the
store's key. The key states for which model, calibration, pruner and space the store was built. The manifest is written
last, so a store without a manifest is unfinished.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from allocator.core.errors import UserError
from allocator.core.files import check_name, check_place, file_fingerprint, fingerprint, read_json, write_json
from allocator.core.space import SearchSpace
from allocator.pruning.levels.compact import CompactLevels

SCHEMA = 1
MANIFEST = "manifest.json"

_KEY = "key.json"


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


class StoreBuilder:
    """An unfinished store, in a hidden folder next to the final one. Every unit in it is complete and survives a crash.

    Several processes, on one machine or many, may write to one store at once. This is safe because every process writes
    the same file for a unit.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Start a store, or continue one that was started with the same key.

        Args:
            folder: Folder of the finished store.
            key: What the store is built for: model, calibration, pruner, space.

        Raises:
            UserError: See :func:`check_free`.
        """
        check_free(folder)
        self._folder, self._key = folder.absolute(), dict(key)
        # each key has its own hidden folder, because runs with different keys may name the same store by mistake
        self._partial = self._folder.with_name(f".{folder.name}.{fingerprint(self._key)[7:19]}.partial")
        key_file = self._partial / _KEY
        if key_file.is_file() and read_json(key_file, "key of a level store") != self._key:
            shutil.rmtree(self._partial, ignore_errors=True)
        if not key_file.is_file():  # the key is written before any unit; another process may write it too
            self._partial.mkdir(parents=True, exist_ok=True)
            write_json(key_file, self._key)

    def __call__(self, unit: str) -> CompactLevels | None:
        """Return the compact levels of a unit; None if it was not written yet."""
        path = self._path(unit)
        return load_file(path) if path.is_file() else None

    def __contains__(self, unit: str) -> bool:
        """Return whether a unit was written."""
        return self._path(unit).is_file()

    def write(self, unit: str, levels: CompactLevels) -> None:
        """Write a unit.

        Raises:
            UserError: The disk is full, or fails. Finished units are kept.
        """
        path = self._path(unit)
        temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in levels.items()}, temporary)
            temporary.replace(path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            if not self._partial.exists():
                return  # another process has just finished the store
            raise self._unwritable(error) from None

    def missing(self, space: SearchSpace) -> list[int]:
        """Return the numbers of the blocks with unwritten units, in increasing order."""
        return sorted({unit.block for unit in space.units if unit.name not in self})

    def fill(self, made: Iterable[tuple[str, CompactLevels]]) -> list[str]:
        """Write units as they are made, and return their names."""
        names = []
        for unit, levels in made:
            self.write(unit, levels)
            names.append(unit)
        return names

    def finish(self, units: Iterable[str]) -> LevelStore:
        """Write the manifest, move the store to its folder, and open it.

        Args:
            units: Names of its units; files of other units are removed.

        Raises:
            UserError: The disk is full, or fails. Finished units are kept.
        """
        try:
            hashes = {unit: file_fingerprint(self._path(unit)) for unit in units}
            manifest = {"schema": SCHEMA, "kind": "allocator.levels", "key": self._key, "units": hashes}
            write_json(self._partial / MANIFEST, manifest)
            for path in self._partial.iterdir():
                if path.name != MANIFEST and path.stem not in hashes:
                    path.unlink()
            self._partial.rename(self._folder)
        except OSError as error:
            if (other := open_store(self._folder, self._key)) is None:  # perhaps another process has just finished it
                raise self._unwritable(error) from None
            return other
        return LevelStore(self._folder)

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"{self._folder}: the level store cannot be written ({error}). Free some space and resume: "
            "finished units are kept. Or name a folder on another disk with --set store=FOLDER"
        )

    def _path(self, unit: str) -> Path:
        return self._partial / f"{unit}.safetensors"


def open_store(folder: Path, key: Mapping[str, Any]) -> LevelStore | None:
    """Open a finished store; return None if the folder has none.

    Raises:
        UserError: The store belongs to another model, calibration or setting, or one of its files is damaged.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST, "level store manifest")
    remedy = f"Remove {folder} to have it built again, or name another folder with --set store=FOLDER"
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
        raise UserError(f"{folder / MANIFEST}: damaged: it does not list {strays[0]}, whose file exists. {remedy}")
    for unit, expected in manifest["units"].items():
        check_name(unit, folder / MANIFEST)
        path = folder / f"{unit}.safetensors"
        if not path.is_file():
            raise UserError(f"{path}: missing from the level store. {remedy}")
        if file_fingerprint(path) != expected:
            raise UserError(f"{path}: damaged: its hash differs from the manifest. {remedy}")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: not readable: {error}. {remedy}") from None
    return LevelStore(folder)


def check_free(folder: Path) -> None:
    """Check that a store can be written to a folder. The folder must be empty or not exist.

    Raises:
        UserError: The folder is not empty, or cannot be written to.
    """
    remedy = "Name an empty or new folder with --set store=FOLDER"
    if folder.is_dir() and (entry := next(folder.iterdir(), None)) is not None:
        raise UserError(
            f"{folder}: not a level store, and it holds {entry.name}. Existing files are not replaced. {remedy}"
        )
    check_place(folder, remedy)
