"""The configuration of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, field_validator, model_validator

from allocator.core.costs import COSTS, Bound
from allocator.core.errors import did_you_mean
from allocator.core.strict import StrictModel
from allocator.model.checkpoint.headers import PACKAGED
from allocator.run.config.sections import (
    LadderSettings,
    PrunerSettings,
    TokenSettings,
    TrainingSettings,
    WorkerSettings,
    WorkloadSettings,
)
from allocator.searchers.methods.presets import PRESETS, read_preset
from allocator.searchers.settings import SearchSettings, choose_method

DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]

Pattern = Literal["structured", "unstructured", "n:m"]

PLACES = ("name", "runs_dir", "store", "model", "text", "domains", "family", "workers", "worker", "address", "device")
"""Keys that say where a run works and how many workers it has.

The content of the files and folders is part of a run's identity. The keys themselves are not.
"""

_DEFAULT_TARGET = 0.5
_DEFAULT_ROUNDS = 2


class RunConfig(StrictModel):
    """Everything that a run depends on. Every default is written into ``run.yaml``.

    Attributes:
        model: A Hugging Face folder, a hub id, or the name of the packaged model.
        text: A .txt or .jsonl file, or a folder of text. ``python`` for the Python standard library, which is also the
            text of the packaged model if none is named.
        domains: Several texts by name, in place of ``text``. Every split takes sequences from each text in turn. The
            loss on each domain is also measured separately, for example as ``kl.code``.
        family: A family file. None for the families of the package.
        pattern: What is removed. ``structured``: channels, KV groups, experts. ``unstructured``: single weights.
            ``n:m``: a fixed number of the weights in each group.
        target: Share of the parameters inside units to remove. The default is 0.5 if there is no constraint and no
            objective is a cost.
        objectives: What the search minimises in addition to the loss: costs or the negative log-likelihood (``nll``).
            Losses on domains (``kl.code``) replace the loss. With objectives, the search finds a front. Without a
            target, the plan is the knee of the front. With a target, the plan is the member with the lowest loss that
            meets the target.
        constraints: Bounds on costs of the whole model, such as ``latency_ms <= 12``, ``kv_bytes <= 2GiB`` or
            ``params <= 0.5x`` (half of the dense model's parameters). :mod:`allocator.core.costs` lists the costs.
        seed: Seed of the search.
        name: Name of the run. None for a name made of model, pattern, target and seed.
        runs_dir: The folder of runs.
        store: Folder of the level store, which runs may share. None for a folder inside the run.
        workers: Maximum number of Ray workers. Workers that do not fit on the cluster wait for new nodes. 0 runs
            everything in this process.
        worker: The resources that each worker takes from its node.
        address: A running Ray cluster. None for a local one.
        dtype: Data type of evaluations.
        threads: CPU threads of one evaluation.
        device: Device of evaluations, ``cpu`` or ``cuda``.
        loss: What the search minimises. ``kl``: divergence from the dense model. ``topk_kl``: divergence on the dense
            model's most probable tokens. ``nll``: negative log-likelihood of the text. ``hidden``: relative
            distance of the last hidden states.
        ladder: The levels of units.
        pruner: The local pruner.
        tokens: The sequence length and the number of tokens for each purpose.
        workload: The workload that the pruned model will serve.
        search: The search method, its budget and its settings.
        training: How candidates are trained.
    """

    model: str = PACKAGED
    text: Path | None = None
    domains: dict[DomainName, Path | None] = Field(default_factory=dict)
    family: Path | None = None
    pattern: Pattern = "structured"
    target: float | None = None
    objectives: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: Path = Path("runs")
    store: Path | None = None
    workers: int = Field(default_factory=lambda: min(4, _count_cpus()), ge=0)
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
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        filled["search"] = _fill_search(filled)
        if filled.get("target") is None and not filled.get("constraints"):
            if not set(_list_names(filled.get("objectives"))) & set(COSTS):
                filled["target"] = _DEFAULT_TARGET
        return filled

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected each objective only once")
        return value

    @field_validator("domains")
    @classmethod
    def _make_domains_absolute(cls, value: dict[str, Path | None]) -> dict[str, Path | None]:
        if len(value) == 1:
            raise ValueError("expected two domains or more. For one text, set text")
        return {name: text and text.absolute() for name, text in value.items()}  # a run may be resumed from elsewhere

    @model_validator(mode="after")
    def _check_search(self) -> RunConfig:
        known = {**dict.fromkeys(COSTS), **dict.fromkeys(self.measured)}
        for name in self.objectives:
            if name not in known:
                raise ValueError(f"objectives: unknown {name!r}{did_you_mean(name, known)}")
        if self.domains and self.text is not None:
            raise ValueError("domains: domains and text exclude each other. Leave one of them out")
        self.search.check_objectives(self.loss, self.objectives)
        return self

    @field_validator("constraints")
    @classmethod
    def _check_constraints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Bound.parse(text, COSTS)
        return value

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """The constraints, parsed."""
        return tuple(Bound.parse(text, COSTS) for text in self.constraints)

    @property
    def measured(self) -> tuple[str, ...]:
        """The measurements that may be objectives: the loss of every domain, and the negative log-likelihood."""
        return (*(f"{self.loss}.{name}" for name in self.domains), *(() if self.loss == "nll" else ("nll",)))

    @property
    def asked(self) -> str:
        """The objectives, target and constraints in words."""
        front = [f"front of {' and '.join(self.objectives)}"] if self.objectives else []
        return ", ".join([*front, *([] if self.target is None else [f"target {self.target:g}"]), *self.constraints])

    @property
    def run_name(self) -> str:
        """The given name, or a name made from the model, the settings and the seed."""
        pattern = self.pattern.replace(":", "")  # file names should have no colon
        share = "".join(f"-{name}" for name in self.objectives) + ("" if self.target is None else f"-{self.target:g}")
        bounds = "".join(f"-{re.sub('[^A-Za-z0-9.]+', '-', text)}" for text in self.constraints)
        return self.name or f"{Path(self.model).name}-{pattern}{share}{bounds}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.runs_dir / self.run_name

    def identity(self) -> dict[str, Any]:
        """Return the settings that two runs of one search have in common: all except names, places and workers."""
        places: dict[str, Any] = {**dict.fromkeys(PLACES, True), "pruner": {"along"}, "workload": {"latency"}}
        names = {"domains": list(self.domains)} if self.domains else {}
        return {**self.model_dump(mode="json", exclude=places), **names}

    def to_yaml(self) -> str:
        """Return the content of ``run.yaml``. It lacks the cluster's address, so a resumed run must name it again."""
        return str(yaml.safe_dump(self.model_dump(mode="json", exclude={"address"}), sort_keys=False))


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill_search(data: dict[str, Any]) -> Any:
    """Return the ``search`` section with the published numbers of a preset, and with ``auto`` replaced.

    For a front, ``auto`` is replaced by a method for fronts. At one budget, ``auto`` has two rounds by default. The
    second round makes finer ladders, so the default does not apply if the run names its ladders.
    """
    search = data.get("search", {})
    if not isinstance(search, dict):
        return search
    search, ladder = dict(search), data.get("ladder") or {}
    method, objectives = search.get("method", "auto"), _list_names(data.get("objectives"))
    if method in PRESETS:
        published = read_preset(method, data.get("pattern", RunConfig.model_fields["pattern"].default))
        search["evolution"] = {**published, **(search.get("evolution") or {})}
    if method == "auto" and objectives:
        search["method"] = choose_method(objectives)
    elif method == "auto" and data.get("pattern") != "n:m" and _has_default_ladder(ladder):
        search.setdefault("rounds", _DEFAULT_ROUNDS)
    return search


def _has_default_ladder(ladder: Any) -> bool:
    if isinstance(ladder, LadderSettings):
        return ladder.sparsities is None
    return isinstance(ladder, dict) and ladder.get("sparsities") is None


def _list_names(value: Any) -> Sequence[str]:
    """Return the names in a list that is not validated yet."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, (list, tuple)) else []
