"""What every export keeps to.

It refuses before any work what its target cannot express, writes a folder that is whole or absent, says what was lost,
and leaves a command that compares what another tool made with the plan, matrix by matrix.
"""

from __future__ import annotations

import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from allocator.core.errors import UserError
from allocator.core.files import read_json, write_json
from allocator.core.plan import Plan
from allocator.interop.targets.matrices import Matrix, matrices
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.model.live.write import stored_name

PLANNED = "planned.json"
VERIFY = "verify.py"


@dataclass(frozen=True)
class Source:
    """What is handed over.

    Attributes:
        plan: The plan.
        checkpoint: The dense model; its headers are enough.
        layout: Where the plan's units are in it.
        run: The run that the plan came from, for targets that show a search; None for a plan alone.
        executed: The checkpoint of the plan, for targets that carry weights; None where it is not at hand.
    """

    plan: Plan
    checkpoint: Checkpoint
    layout: Layout
    run: Path | None = None
    executed: Path | None = None

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """What the plan keeps of every matrix of its units; which experts stay, its checkpoint says."""
        said: dict[str, Any] = {}
        if self.executed is not None and (self.executed / "config.json").is_file():
            said = read_json(self.executed / "config.json", "model configuration").get("pruned") or {}
        experts = {name: kept for name, (_, kept) in said.get("experts", {}).items()}
        return matrices(self.plan, self.checkpoint, self.layout, experts)


class Target(ABC):
    """A tool that plans are handed to.

    Attributes:
        name: What ``--to`` takes.
        writes: What is written, in a line.
        patterns: Of plans that it can express.
        varies: Patterns of files of which the same plan does not give the same bytes, since another program writes
            numbers into them that it draws.
        any_kind: Whether it takes plans of models that do not generate.
    """

    name: ClassVar[str]
    writes: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    varies: ClassVar[tuple[str, ...]] = ()
    any_kind: ClassVar[bool] = False

    def check(self, source: Source) -> None:  # noqa: B027
        """Check what the plan's pattern does not tell.

        Raises:
            UserError: The target cannot express this plan.
        """

    @abstractmethod
    def write(self, source: Source, folder: Path) -> list[str]:
        """Write into a folder that is there and empty; return what was lost, and how to go on, in lines for a user."""


def check(target: Target, source: Source) -> None:
    """Raise a :class:`UserError` unless a target can express a plan."""
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


def write_verify(
    folder: Path,
    source: Source,
    *,
    tolerance: float = 0.0,
    shapes: Sequence[tuple[str, Any]] | None = None,
    kept: Mapping[str, int] | None = None,
) -> str:
    """Leave what compares a checkpoint with the plan, matrix by matrix, and return the command for a user.

    The script needs torch and safetensors, and nothing of this package. It reads what is planned from a file beside it.

    Args:
        folder: Where to.
        source: What is handed over.
        tolerance: Share of a matrix by which its zeros may differ, for tools that round.
        shapes: (module, shape) of matrices that are stored in another shape than the plan's, as padded ones are;
            what the plan takes is zero in them.
        kept: Weights that stay in modules of which the target leaves another number than the plan.
    """
    stored, left = dict(shapes or ()), kept or {}
    modules = {}
    for matrix in source.matrices:
        shape = list(stored.get(matrix.module, matrix.kept_shape))
        modules[stored_name(source.checkpoint, f"{matrix.module}.weight").removesuffix(".weight")] = {
            "shape": shape if all(shape) else None,
            "zeros": max(0, shape[0] * shape[1] - left.get(matrix.module, matrix.kept)),
            "group": None if matrix.group is None else list(matrix.group),
            "transposed": f"{matrix.module}.weight" in source.checkpoint.transposed,
        }
    write_json(folder / PLANNED, {"tolerance": tolerance, "modules": modules})
    copy_script(VERIFY, folder)
    return f"python {VERIFY} CHECKPOINT"


def refuse_other_layers(target: Target, source: Source) -> None:
    """Raise a :class:`UserError` where matrices are not those of linear layers, which some tools look for alone."""
    if source.layout.mixtures:
        raise UserError(
            f"export: {target.name} knows linear layers, and transformers stacks the experts of "
            f"{source.checkpoint.architecture}. Use --to ratios, or --to hf for the executed plan"
        )
    if source.checkpoint.transposed:
        raise UserError(
            f"export: {target.name} knows linear layers, and those of {source.checkpoint.architecture} are Conv1D, "
            f"inputs "
            "first. Use --to ratios, or --to hf for the executed plan"
        )


def copy_script(name: str, folder: Path) -> None:
    """Copy a script of this package that runs without it; one of a target's own lies in a folder of that target."""
    with resources.as_file(resources.files("allocator.interop") / "scripts" / name) as path:
        shutil.copyfile(path, folder / path.name)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def command(*words: object) -> str:
    """Return a command line for a user to copy."""
    return shlex.join(map(str, words))
