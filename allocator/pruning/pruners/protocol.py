"""What a local pruner needs: its protocol, and the problem that a pruner solves.

Shapes: o output rows, i input features of one matrix. ``weight_oi``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from allocator.core.notify import Notify, silent
from allocator.core.space import Unit
from allocator.pruning.calibration.statistics import Need, Statistics
from allocator.pruning.levels.compact import CompactLevels, cast_values

Criterion = Literal["reconstruction", "routing"]
"""How whole experts are chosen; see :mod:`allocator.pruning.pruners.experts`."""


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One unit to prune.

    Attributes:
        unit: The unit with its ladder.
        module: The matrix whose inputs are observed: the unit's own, its output projection, or the router of whole
            experts.
        width: Columns of that matrix per item; 1 for a matrix unit.
        experts: Name of the module that holds the experts, if the unit is whole experts.
    """

    unit: Unit
    module: str
    width: int
    experts: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitProblem:
    """Everything that a local pruner knows about one unit.

    Attributes:
        task: The unit and its matrix.
        weight_oi: The weight of that matrix whose outputs the levels reproduce: the dense one, or the nearest to the
            dense model's outputs on the inputs of a pruned model.
        statistics: Statistics of the inputs of that matrix, of the kind that the pruner needs.
        levels: Indices of the levels to make, without 0.
        dtype: Data type in which levels are kept: the checkpoint's.
    """

    task: UnitTask
    weight_oi: torch.Tensor
    statistics: Statistics
    levels: tuple[int, ...]
    dtype: torch.dtype

    @property
    def unit(self) -> Unit:
        """The unit with its ladder."""
        return self.task.unit

    def solve(self, pruner: LocalPruner, notify: Notify = silent) -> CompactLevels:
        """Return the unit's compact levels in the checkpoint's data type."""
        return cast_values(pruner.levels(self, notify), self.dtype)


@dataclass(frozen=True, slots=True)
class Refit:
    """How a pruner chooses new values for kept weights, so that the target can be set in the same way.

    Attributes:
        damping: λ, as a share of the mean of the diagonal of XᵀX.
        intercept: Whether it fits a bias too.
    """

    damping: float
    intercept: bool = False


class LocalPruner(Protocol):
    """Prunes one unit at all of its levels, from its weight and statistics of its inputs."""

    @property
    def name(self) -> str:
        """What a configuration and a plan call it."""
        ...

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that it serves: ``structured``, ``unstructured`` or ``n:m``."""
        ...

    @property
    def need(self) -> Need:
        """Which statistics of the inputs it uses; ``gram`` if it refits."""
        ...

    @property
    def refit(self) -> Refit | None:
        """How it chooses new values for kept weights; None if it keeps the old ones.

        By default, the store of a pruner that refits is built on expected inputs, and its plan is pruned again along
        its own path.
        """
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return the settings that the levels depend on, in JSON types: a plan and a level store record them."""
        ...

    def levels(self, problem: UnitProblem, notify: Notify = silent) -> CompactLevels:
        """Return the compact levels of a unit; see :mod:`allocator.pruning.levels.compact`.

        Floating-point tensors may have any precision. A level must not depend on which other levels are made. The
        tensors of the problem must not be changed.

        Args:
            problem: The unit, its weight, the statistics and the levels to make.
            notify: Called with a message for the user, such as more damping than was set.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunerSpec:
    """Everything that a local pruner can be made from. A pruner takes the settings that it knows.

    Attributes:
        name: Key of ``PRUNERS``; None for the default of the pattern.
        damping: Share of the mean of the Hessian's diagonal that is added to the diagonal.
        bias: Whether a structured pruner fits a bias.
        experts: How whole experts are chosen; None where no unit is whole experts.
    """

    name: str | None = None
    damping: float = 0.01
    bias: bool = False
    experts: Criterion | None = None

    @classmethod
    def from_plan(cls, record: Mapping[str, Any]) -> PrunerSpec:
        """Return the settings that a plan records in ``pruner``; other keys of the record are ignored."""
        known = {key: record[key] for key in ("damping", "bias", "experts") if key in record}
        return cls(name=record["name"], **known)


class PrunerType(Protocol):
    """A class of local pruners, as ``PRUNERS`` holds it."""

    @property
    def name(self) -> str:
        """What a configuration and a plan call its pruners."""
        ...

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that it serves: ``structured``, ``unstructured``, ``n:m``."""
        ...

    def from_spec(self, spec: PrunerSpec) -> LocalPruner:
        """Return the pruner with the settings that it takes from ``spec``."""
        ...
