"""The sections of a run file: ladders, the local pruner, tokens, training, the workload and workers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from allocator.core.strict import StrictModel
from allocator.model.family.schema import Attention, Experts


class LadderSettings(StrictModel):
    """The levels of units.

    Attributes:
        sparsities: Sparsities of every unit, dense excluded. None for the default ladder.
        align: Widths of channels are multiples of this number.
        patterns: Levels of the n:m pattern, dense excluded: how many weights of each group are kept.
        attention: What structured pruning removes from attention. ``kv_groups``: KV groups together with their query
            heads. ``query_heads``: query heads alone, equally many from every KV group.
        experts: What structured pruning removes from a mixture of experts: ``whole`` experts, or channels ``inside``
            each expert.
    """

    sparsities: tuple[float, ...] | None = Field(default=None, max_length=128)
    align: int = Field(default=1, ge=1)
    patterns: tuple[str, ...] = Field(default=("2:4", "1:4"), max_length=128)
    attention: Attention = "kv_groups"
    experts: Experts = "whole"

    @field_validator("sparsities")
    @classmethod
    def _check_increasing(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (list(value) != sorted(set(value)) or not value or value[0] <= 0 or value[-1] > 1):
            raise ValueError("expected increasing sparsities in (0, 1], such as [0.25, 0.5, 0.75, 1.0]")
        return value

    @field_validator("patterns", mode="before")
    @classmethod
    def _check_patterns(cls, value: Any) -> Any:
        shape = 'expected kept:group in quotes (YAML reads 2:4 without them as 124), such as ["2:4", "1:4"]'
        if not isinstance(value, (list, tuple)) or not all(re.fullmatch("[0-9]+:[0-9]+", str(item)) for item in value):
            raise ValueError(shape)
        kept, groups = zip(*(map(int, item.split(":")) for item in value), strict=True) if value else ((), ())
        if len({*groups}) != 1 or list(kept) != sorted({*kept}, reverse=True) or kept[0] >= groups[0]:
            raise ValueError("expected groups of one size and ever fewer kept of each, such as ['4:8', '2:8', '0:8']")
        return value


class PrunerSettings(StrictModel):
    """The local pruner.

    Attributes:
        name: ``obs`` (structured), ``wanda``, ``magnitude`` or ``sparsegpt`` (unstructured, n:m). None for the
            pattern's default.
        damping: Share of the mean of the Hessian's diagonal that is added to the diagonal.
        inputs: The inputs on which the level store's units are pruned. ``dense``: outputs of dense predecessors.
            ``expected``: the average over the predecessors' levels. ``path``: predecessors at the levels of one
            allocation; in later rounds this is the incumbent. None for ``expected`` if the pruner refits weights and
            no other round follows, else ``dense``.
        along: A plan whose allocation is the path of ``inputs=path``. None for uniform.
        execution: How the chosen plan becomes a checkpoint. ``recompute``: the model is pruned again along the plan's
            own path. ``assemble``: the levels come from the store. None for ``recompute`` if the pruner refits weights.
        bias: Whether structured pruning adds the mean output of what is removed as a bias.
        experts: How whole experts are chosen. ``reconstruction``: by the error of the mixture's output without them,
            on as many of the first tokens as :data:`~allocator.pruning.calibration.routing.GRAM_BYTES` allow.
            ``routing``: by the weights that the router gives them.
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
    def _make_absolute(cls, value: Path | None) -> Path | None:
        return value and value.absolute()  # a run may be resumed from another folder


class TokenSettings(StrictModel):
    """How much text serves what. The search's own fidelities are settings of ``search``.

    Attributes:
        sequence_length: Tokens per packed sequence.
        calibration: Tokens on which units are pruned.
        selection: Tokens on which the winner is chosen among the finalists.
        test: Tokens of the reported figures.
    """

    sequence_length: int = Field(default=512, ge=8)
    calibration: int = Field(default=16384, ge=1)
    selection: int = Field(default=8192, ge=1)
    test: int = Field(default=16384, ge=1)


class TrainingSettings(StrictModel):
    """How candidates are trained, in a search that sets ``search.evolution.training``.

    Attributes:
        learning_rate: The constant learning rate of AdamW. The default is that of the DarwinLM paper.
        batch_sequences: Sequences per step.
    """

    learning_rate: float = Field(default=1e-5, gt=0)
    batch_sequences: int = Field(default=1, ge=1)


class WorkloadSettings(StrictModel):
    """The workload that the pruned model will serve. Costs of serving are costs of this workload.

    Attributes:
        batch: Sequences that are served together.
        prompt: Tokens of each prompt.
        generate: Tokens that are generated after each prompt.
        latency: A latency table of this workload, measured by ``allocator latency`` on the device that will serve.
    """

    batch: int = Field(default=1, ge=1)
    prompt: int = Field(default=512, ge=1)
    generate: int = Field(default=128, ge=0)
    latency: Path | None = None

    @field_validator("latency")
    @classmethod
    def _make_absolute(cls, value: Path | None) -> Path | None:
        return value and value.absolute()  # a run may be resumed from another folder


class WorkerSettings(StrictModel):
    """What each Ray worker takes from its node, in addition to one CPU per thread.

    Attributes:
        gpus: GPUs per worker where the device is ``cuda``. 0.5 puts two workers on one GPU.
        resources: Amounts of the custom resources that nodes were given with ``ray start --resources``.
    """

    gpus: float = Field(default=1.0, gt=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("expected a share of one GPU, or whole ones")
        return value

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, value: dict[str, float]) -> dict[str, float]:
        if taken := {"CPU", "GPU", "memory", "object_store_memory"} & set(value):
            raise ValueError(f"{', '.join(sorted(taken))} is Ray's own; CPUs are threads, and GPUs worker.gpus")
        return value
