"""The contract of exports: what is handed over, and what a target does with it.

A target refuses a plan that it cannot express before any work. It writes a folder that is complete or absent, reports
what was lost, and leaves a command that compares what another tool made with the plan, matrix by matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from allocator.core.errors import UserError
from allocator.core.files import read_json
from allocator.core.plan import Plan
from allocator.interop.matrices import Matrix, list_matrices
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is handed over.

    Attributes:
        plan: The plan.
        checkpoint: The dense model; its headers are enough.
        layout: The places of the plan's units in the model.
        run: The folder of the run that found the plan, for targets that show a search; None for a plan alone.
        executed: The folder of the plan's checkpoint, for targets that carry weights; None where there is none.
    """

    plan: Plan
    checkpoint: Checkpoint
    layout: Layout
    run: Path | None = None
    executed: Path | None = None

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """What the plan keeps of every matrix of its units. The checkpoint tells which experts stay."""
        pruned: dict[str, Any] = {}
        if self.executed is not None and (self.executed / "config.json").is_file():
            pruned = read_json(self.executed / "config.json", "model configuration").get("pruned") or {}
        experts = {name: kept for name, (_, kept) in pruned.get("experts", {}).items()}
        return list_matrices(self.plan, self.checkpoint, self.layout, experts)


class Target(ABC):
    """A tool that plans are handed to.

    Attributes:
        name: The value of ``--to``.
        writes: What it writes, in one line.
        patterns: The patterns of the plans that it can express.
        varies: Glob patterns of the files whose bytes differ between exports of the same plan, because another program
            writes random numbers into them.
        any_kind: Whether it takes plans of models that do not generate text.
    """

    name: ClassVar[str]
    writes: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    varies: ClassVar[tuple[str, ...]] = ()
    any_kind: ClassVar[bool] = False

    def check(self, source: Source) -> None:  # noqa: B027
        """Check what the pattern of the plan does not tell.

        Raises:
            UserError: The target cannot express this plan.
        """

    @abstractmethod
    def write(self, source: Source, folder: Path) -> list[str]:
        """Write into an existing, empty folder; return lines for the user: what was lost, and how to go on."""


def check_target(target: Target, source: Source) -> None:
    """Check that a target can express a plan.

    Raises:
        UserError: It cannot.
    """
    pattern = source.plan.space.pattern
    if pattern not in target.patterns:
        raise UserError(
            f"export: {target.name} cannot express {pattern} plans, only {' and '.join(target.patterns)} ones. "
            f"See 'allocator export --list' for one that can"
        )
    if not (target.any_kind or source.checkpoint.kind.generates):
        raise UserError(
            f"export: {target.name} takes plans of causal language models, and this one is of "
            f"{source.checkpoint.architecture}. Use --to ratios, or --to hf for the executed plan"
        )
    target.check(source)


def require_linear_layers(target: Target, source: Source) -> None:
    """Check that all matrices belong to linear layers, for tools that know no others.

    Raises:
        UserError: Some do not.
    """
    if source.layout.mixtures:
        raise UserError(
            f"export: {target.name} knows linear layers, and transformers stacks the experts of "
            f"{source.checkpoint.architecture}. Use --to ratios, or --to hf for the executed plan"
        )
    if source.checkpoint.transposed:
        raise UserError(
            f"export: {target.name} knows linear layers, and those of {source.checkpoint.architecture} are Conv1D, "
            "inputs first. Use --to ratios, or --to hf for the executed plan"
        )
