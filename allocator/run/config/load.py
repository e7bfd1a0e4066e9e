"""Building a configuration: one strict file, overridden by options, overridden by ``a.b=c`` assignments."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from allocator.core.errors import UserError, did_you_mean
from allocator.run.config.options import RunOptions
from allocator.run.config.run import RunConfig

_NESTED = {"method": "search.method", "budget": "search.budget"}
"""Options whose key in a run file is inside a section."""


def build_config(
    model: Path | str | None = None,
    config: RunConfig | Path | str | None = None,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> RunConfig:
    """Return the configuration that a verb was called with.

    Args:
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration, or a run file. Options override it.
        options: See :class:`RunOptions`. None values are ignored.
        resume: Whether the run of this name is resumed: its own ``run.yaml`` then comes before the defaults.

    Raises:
        UserError: An option or a key is unknown, a value is not allowed, or the file cannot be read.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    if unknown := sorted(given.keys() - RunOptions.__annotations__.keys()):
        raise UserError(f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], RunOptions.__annotations__)}")
    assignments = [f"{_NESTED[name]}={given.pop(name)}" for name in _NESTED if name in given]
    assignments += given.pop("settings", ())
    keys = {**given, **({} if model is None else {"model": str(model)})}
    if not isinstance(config, RunConfig):
        return load_config(None if config is None else Path(config), keys, assignments, resume)
    if not keys and not assignments:
        return config
    data = {**config.model_dump(exclude_unset=True), **keys}
    for assignment in assignments:
        assign(data, assignment)
    return validate(data)


def load_config(
    file: Path | None = None,
    keys: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    resume: bool = False,
) -> RunConfig:
    """Return the configuration of a file, overridden by keys, overridden by assignments.

    Args:
        file: A run file in YAML. None for the defaults, or for the ``run.yaml`` of a run that is resumed.
        keys: Top-level keys. None values are ignored.
        assignments: Such as ``search.evolution.generations=10``. Values are YAML.
        resume: Whether the run of this name is resumed.

    Raises:
        UserError: The file cannot be read, a key is unknown, or a value is not allowed.
    """
    given = {key: value for key, value in (keys or {}).items() if value is not None}
    assignments = list(assignments)
    config = validate(read_keys(file, given, assignments), file)
    if not resume or file is not None:
        return config
    place = {"runs_dir": config.runs_dir, "name": config.run_name}
    return validate(read_keys(None, {**_read_stored(config.folder), **given, **place}, assignments))


def read_keys(file: Path | None, keys: Mapping[str, Any], assignments: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keys of a file, overridden by ``keys``, overridden by assignments. No value is validated.

    Raises:
        UserError: The file cannot be read, or an assignment has another form than ``key=value``.
    """
    data: dict[str, Any] = {}
    if file is not None:
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot read the run file: {error}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{file}: not YAML: {error}") from None
        if not isinstance(data, dict):
            raise UserError(f"{file}: a run file is a mapping of keys, found {type(data).__name__}")
    data.update((key, value) for key, value in keys.items() if value is not None)
    for assignment in assignments:
        assign(data, assignment)
    return data


def validate(data: Mapping[str, Any], source: Path | None = None) -> RunConfig:
    """Return the configuration that some keys describe.

    Args:
        data: The keys.
        source: The file that they come from, for messages.

    Raises:
        UserError: A key is unknown, or a value is not allowed.
    """
    try:
        return RunConfig.model_validate(copy.deepcopy(dict(data)))
    except ValidationError as error:
        raise UserError(f"{source or 'configuration'}: {_explain(error)}") from None


def assign(data: dict[str, Any], assignment: str) -> None:
    """Set the key that an assignment such as ``search.evolution.generations=10`` names.

    Raises:
        UserError: It has another form, or its value is not YAML.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"--set {assignment}: expected key=value, such as search.evolution.generations=10")
    *parents, last = path.strip().split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {assignment}: {parent} is not a group of keys")
        data = inner
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not YAML: {error}") from None


def _read_stored(folder: Path) -> dict[str, Any]:
    """Return the keys of a run's own ``run.yaml``."""
    path = folder / "run.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such run. Start it without --resume")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}. Restore it, or give the run file again with --resume") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: a run file is a mapping of keys. Restore it, or give the run file with --resume")
    return stored


def _explain(error: ValidationError) -> str:
    """Return the first fault in words."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location) or "top level"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known: Any = RunConfig().model_dump()
        if location[-1] in known:
            return f"unknown key {where!r}; {location[-1]!r} is a key of the top level"
        for part in location[:-1]:
            known = known[part]
        return f"unknown key {where!r}{did_you_mean(location[-1], known)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}; found {first['input']!r}" if location else message
