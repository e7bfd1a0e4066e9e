"""The configuration of a run: one strict file, a few flags, and ``--set a.b=c`` for the rest."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from allocator.core.costs import COSTS, Bound
from allocator.core.errors import UserError, did_you_mean
from allocator.model.checkpoint.headers import PACKAGED
from allocator.model.family.schema import Attention, Experts
from allocator.searchers.methods.presets import PRESETS, read_preset
from allocator.searchers.settings import SearchSettings, choose_method

DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]

Pattern = Literal["structured", "unstructured", "n:m"]

PLACES = ("name", "runs_dir", "store", "model", "text", "domains", "family", "workers", "worker", "address", "device")
"""Keys that say where and how wide to run. What they lead to is part of a run's identity; they are not."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LadderSettings(_Strict):
    """Levels of units.

    Attributes:
        sparsities: Sparsities of every unit beside dense, in place of the default ladder.
        align: Widths of channels are multiples of this.
        patterns: Levels beside dense of the n:m pattern: how many weights of each group are kept.
        attention: What structured pruning removes from attention: KV groups with the query heads that they
            serve, or query heads alone, equally many from every KV group.
        experts: What structured pruning removes from a mixture of experts: ``whole`` experts, or channels ``inside``
            of each.
    """

    sparsities: tuple[float, ...] | None = Field(default=None, max_length=128)
    align: int = Field(default=1, ge=1)
    patterns: tuple[str, ...] = Field(default=("2:4", "1:4"), max_length=128)
    attention: Attention = "kv_groups"
    experts: Experts = "whole"

    @field_validator("sparsities")
    @classmethod
    def _increasing(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (list(value) != sorted(set(value)) or not value or value[0] <= 0 or value[-1] > 1):
            raise ValueError("expected increasing sparsities in (0, 1], such as [0.25, 0.5, 0.75, 1.0]")
        return value

    @field_validator("patterns", mode="before")
    @classmethod
    def _decreasing(cls, value: Any) -> Any:
        shape = 'expected kept:group in quotes (YAML reads 2:4 without them as 124), such as ["2:4", "1:4"]'
        if not isinstance(value, (list, tuple)) or not all(re.fullmatch("[0-9]+:[0-9]+", str(item)) for item in value):
            raise ValueError(shape)
        kept, groups = zip(*(map(int, item.split(":")) for item in value), strict=True) if value else ((), ())
        if len({*groups}) != 1 or list(kept) != sorted({*kept}, reverse=True) or kept[0] >= groups[0]:
            raise ValueError("expected groups of one size and ever fewer kept of each, such as ['4:8', '2:8', '0:8']")
        return value


class PrunerSettings(_Strict):
    """The local pruner.

    Attributes:
        name: ``obs`` (structured), ``wanda``, ``magnitude`` or ``sparsegpt`` (unstructured, n:m); None for the
            pattern's default.
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        inputs: What the level store's units are pruned on: the outputs of whole predecessors (``dense``), the average
            over their levels (``expected``), or predecessors at the levels of one allocation (``path``; in rounds after
            the first that of the incumbent). None for ``expected`` where the pruner chooses new values, but ``dense``
            in rounds that another follows.
        along: A plan whose allocation is that path; None for uniform.
        execution: How the chosen plan becomes a checkpoint: pruned again along its own path (``recompute``), or put
            together from the store (``assemble``); None for ``recompute`` where the pruner chooses new values.
        bias: Whether structured pruning gives back the mean output of what is lost, as a bias.
        experts: How whole experts are chosen: by what is lost of the mixture's output without them
            (``reconstruction``, on as many of the first tokens as
            :data:`~allocator.pruning.calibration.routing.GRAM_BYTES` allow), or by what the router gives them
            (``routing``).
    """

    name: str | None = None
    damping: float = Field(default=0.01, gt=0)
    inputs: Literal["dense", "expected", "path"] | None = None
    along: Path | None = None
    execution: Literal["recompute", "assemble"] | None = None
    bias: bool = False
    experts: Literal["reconstruction", "routing"] = "reconstruction"

    @field_validator("along")
    @classmethod
    def _anywhere(cls, value: Path | None) -> Path | None:
        return value and value.absolute()  # a run may be resumed from another folder


class TokenSettings(_Strict):
    """How much text is used for what; the search's own fidelities are in ``search``.

    Attributes:
        sequence_length: Tokens per packed sequence.
        calibration: Tokens from which units are pruned.
        selection: Tokens on which the winner is chosen among the finalists.
        test: Tokens of the reported figures.
    """

    sequence_length: int = Field(default=512, ge=8)
    calibration: int = Field(default=16384, ge=1)
    selection: int = Field(default=8192, ge=1)
    test: int = Field(default=16384, ge=1)


class TrainingSettings(_Strict):
    """How candidates are trained, in a search that asks for it with ``search.evolution.training``.

    Attributes:
        learning_rate: Of AdamW, constant; that of the paper of DarwinLM.
        batch_sequences: Sequences of one step.
    """

    learning_rate: float = Field(default=1e-5, gt=0)
    batch_sequences: int = Field(default=1, ge=1)


class WorkloadSettings(_Strict):
    """What the pruned model will serve at once; costs of serving are for it.

    Attributes:
        batch: Sequences at once.
        prompt: Tokens of each that are there before.
        generate: Tokens that are generated after them.
        latency: A latency table, made by ``allocator latency`` for this workload on the device to serve with.
    """

    batch: int = Field(default=1, ge=1)
    prompt: int = Field(default=512, ge=1)
    generate: int = Field(default=128, ge=0)
    latency: Path | None = None

    @field_validator("latency")
    @classmethod
    def _anywhere(cls, value: Path | None) -> Path | None:
        return value and value.absolute()  # a run may be resumed from another folder


class WorkerSettings(_Strict):
    """What each Ray worker takes of the node that it is on, beside a CPU for every thread.

    Attributes:
        gpus: GPUs where the device is ``cuda``: 0.5 puts two workers on one.
        resources: Amounts of resources that nodes were given with ``ray start --resources``.
    """

    gpus: float = Field(default=1.0, gt=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}

    @field_validator("gpus")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("expected a share of one GPU, or whole ones")
        return value

    @field_validator("resources")
    @classmethod
    def _own(cls, value: dict[str, float]) -> dict[str, float]:
        if taken := {"CPU", "GPU", "memory", "object_store_memory"} & set(value):
            raise ValueError(f"{', '.join(sorted(taken))} is Ray's own; CPUs are threads, and GPUs worker.gpus")
        return value


class RunConfig(_Strict):
    """Everything a run depends on. Every default is written into ``run.yaml``.

    Attributes:
        model: A Hugging Face folder, a hub id, or the name of the packaged model.
        text: A .txt or .jsonl file or a folder of text; None for the Python standard library.
        domains: Several such texts by name, in place of one. Every split takes sequences of each in turn, and the loss
            on each is measured apart, such as ``kl.code``.
        family: A family file in place of those shipped.
        pattern: What is removed: whole channels and KV groups, or single weights, or those by the group.
        target: Share of the parameters inside units to remove; 0.5 where there are no constraints and no objective is
            a cost.
        objectives: What shall be small beside the loss: costs, the negative log-likelihood (``nll``), or in place of
            the loss that of some domains (``kl.code``). With any, the answer is a front, and the plan its knee, or with
            a target the member of least loss that keeps it.
        constraints: Bounds on costs of the whole model, such as ``latency_ms <= 12``, ``kv_bytes <= 2GiB`` or
            ``params <= 0.5x``, half of the dense model's. What can be bounded is in :mod:`allocator.core.costs`.
        seed: Of the search.
        name: Of the run; None for one made from model, pattern, target and seed.
        runs_dir: The folder of runs.
        store: Where the level store lies, to share it between runs; None for inside the run.
        workers: Ray workers, at most: those that find no room wait for nodes that join. 0 runs in this process.
        worker: What each of them takes of its node.
        address: A running Ray cluster; None for a local one.
        dtype: Data type of evaluations.
        threads: CPU threads of one evaluation.
        device: Where evaluations run, ``cpu`` or ``cuda``.
        loss: What the search minimises: ``kl`` from the dense model, ``topk_kl`` with its most probable tokens,
            ``nll`` of the text, or ``hidden``, the relative distance of the last hidden states.
    """

    model: str = PACKAGED
    text: Path | None = None
    domains: dict[DomainName, Path | None] = {}
    family: Path | None = None
    pattern: Pattern = "structured"
    target: float | None = None
    objectives: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: Path = Path("runs")
    store: Path | None = None
    workers: int = Field(default_factory=lambda: min(4, _num_cpus()), ge=0)
    worker: WorkerSettings = WorkerSettings()
    address: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    loss: Literal["kl", "topk_kl", "nll", "hidden"] = "kl"
    ladder: LadderSettings = LadderSettings()
    pruner: PrunerSettings = PrunerSettings()
    tokens: TokenSettings = TokenSettings()
    workload: WorkloadSettings = WorkloadSettings()
    search: SearchSettings = SearchSettings()
    training: TrainingSettings = TrainingSettings()

    @model_validator(mode="before")
    @classmethod
    def _halved(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("target") is not None:
            return data
        costs = set(_names(data.get("objectives"))) & set(COSTS)
        return data if data.get("constraints") or costs else {**data, "target": 0.5}

    @field_validator("objectives")
    @classmethod
    def _different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected every objective once")
        return value

    @field_validator("domains")
    @classmethod
    def _everywhere(cls, value: dict[str, Path | None]) -> dict[str, Path | None]:
        if len(value) == 1:
            raise ValueError("expected several domains; one text is named by text")
        return {name: text and text.absolute() for name, text in value.items()}  # a run may be resumed from elsewhere

    @model_validator(mode="after")
    def _served(self) -> RunConfig:
        known = {**dict.fromkeys(COSTS), **dict.fromkeys(self.measured)}
        for name in self.objectives:
            if name not in known:
                raise ValueError(f"objectives: unknown {name!r}{did_you_mean(name, known)}")
        if self.domains and self.text is not None:
            raise ValueError("domains: they take the place of text. Leave one of them out")
        self.search.check_objectives(self.loss, self.objectives)
        return self

    @field_validator("constraints")
    @classmethod
    def _bounds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Bound.parse(text, COSTS)
        return value

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """The constraints."""
        return tuple(Bound.parse(text, COSTS) for text in self.constraints)

    @property
    def measured(self) -> tuple[str, ...]:
        """What is measured beside the loss and may be an objective: the loss of every domain, and the likelihood."""
        return (*(f"{self.loss}.{name}" for name in self.domains), *(() if self.loss == "nll" else ("nll",)))

    @property
    def asked(self) -> str:
        """Objectives, target and constraints, in words."""
        front = [f"front of {' and '.join(self.objectives)}"] if self.objectives else []
        return ", ".join([*front, *([] if self.target is None else [f"target {self.target:g}"]), *self.constraints])

    @property
    def run_name(self) -> str:
        """The name given, or one that says what is run."""
        pattern = self.pattern.replace(":", "")  # colons are no good in file names
        share = "".join(f"-{name}" for name in self.objectives) + ("" if self.target is None else f"-{self.target:g}")
        bounds = "".join(f"-{re.sub('[^A-Za-z0-9.]+', '-', text)}" for text in self.constraints)
        return self.name or f"{Path(self.model).name}-{pattern}{share}{bounds}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return self.runs_dir / self.run_name

    def identity(self) -> dict[str, Any]:
        """Return what two runs of one search have in common: everything but names, places and workers."""
        places: dict[str, Any] = {**dict.fromkeys(PLACES, True), "pruner": {"along"}, "workload": {"latency"}}
        names = {"domains": list(self.domains)} if self.domains else {}
        return {**self.model_dump(mode="json", exclude=places), **names}

    def to_yaml(self) -> str:
        """Return the content of ``run.yaml``: all but the address of a cluster, which is given again on a resume."""
        return str(yaml.safe_dump(self.model_dump(mode="json", exclude={"address"}), sort_keys=False))


def load_config(
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    resume: bool = False,
) -> RunConfig:
    """Return the configuration of a file, overridden by flags, overridden by ``a.b=c`` assignments.

    Args:
        file: A run file in YAML; None for the defaults, or for the ``run.yaml`` of a run that is resumed.
        flags: Top-level keys; None values are left out.
        assignments: Such as ``search.evolution.generations=10``; values are YAML.
        resume: Whether a run of this name is continued.

    Raises:
        UserError: The file cannot be read, a key is unknown, or a value is not allowed.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    assignments = list(assignments)
    config = checked(read_keys(file, given, assignments), file)
    if not resume or file is not None:
        return config
    place = {"runs_dir": config.runs_dir, "name": config.run_name}
    return checked(read_keys(None, {**_stored(config.folder), **given, **place}, assignments))


def search_assignments(method: str | None, budget: str | None) -> list[str]:
    """Return the assignments for two keys of ``search`` that have flags of their own."""
    given = {"search.method": method, "search.budget": budget}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def read_keys(file: Path | None, flags: Mapping[str, Any], assignments: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keys of a file, overridden by flags, overridden by assignments; no value is checked yet.

    Raises:
        UserError: The file cannot be read, or an assignment is none.
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
    data.update((key, value) for key, value in flags.items() if value is not None)
    for assignment in assignments:
        _assign(data, assignment)
    return data


def checked(data: Mapping[str, Any], file: Path | None = None) -> RunConfig:
    """Return the configuration that keys are, those of a file if one is named.

    Raises:
        UserError: A key is unknown, or a value is not allowed.
    """
    own = copy.deepcopy(dict(data))
    _publish(own)
    _refine(own)
    try:
        return RunConfig.model_validate(own)
    except ValidationError as error:
        raise UserError(f"{file or 'configuration'}: {_explain(error)}") from None


def _stored(folder: Path) -> dict[str, Any]:
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


def _assign(data: dict[str, Any], assignment: str) -> None:
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


def _publish(data: dict[str, Any]) -> None:
    """Put the numbers that a method's paper publishes beneath those that are given."""
    search = data.get("search")
    if isinstance(search, dict) and search.get("method") in PRESETS:
        published = read_preset(search["method"], data.get("pattern", RunConfig.model_fields["pattern"].default))
        search["evolution"] = {**published, **(search.get("evolution") or {})}


def _refine(data: dict[str, Any]) -> None:
    """Have ``auto`` be what serves best: for a front another method, and for one budget two rounds where it may.

    It may where nothing is said of rounds or ladders: the second round is on finer ones.
    """
    search, ladder, objectives = data.setdefault("search", {}), data.get("ladder") or {}, _names(data.get("objectives"))
    if not isinstance(search, dict) or not isinstance(ladder, dict) or search.get("method", "auto") != "auto":
        return
    if objectives:
        search["method"] = choose_method(objectives)
    elif data.get("pattern") != "n:m" and ladder.get("sparsities") is None:
        search.setdefault("rounds", 2)


def _names(value: Any) -> list[str]:
    """Return the names in a list that was not checked yet."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, (list, tuple)) else []


def _explain(error: ValidationError) -> str:
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
