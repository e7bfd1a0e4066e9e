"""The dense model that a plan or a checkpoint was made from."""

from __future__ import annotations

from pathlib import Path

from allocator.core.errors import UserError
from allocator.core.plan import Plan
from allocator.model.checkpoint.headers import Checkpoint, locate, read_checkpoint
from allocator.model.family.layout import Layout, resolve_layout
from allocator.model.family.schema import Family, load_shipped_families
from allocator.model.family.space import build_space
from allocator.model.open import open_model
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig


def choose_model(
    model: str | Path | None, family: str | Path | None, config: RunConfig | Path | str | None
) -> tuple[Path, Path | None]:
    """Return the folder of the dense model and its family file: those named, or those of a configuration."""
    settings = build_config(model, config, {"family": family})
    return locate(settings.model), settings.family


def open_dense(folder: Path, family: Path | None) -> tuple[Checkpoint, Family]:
    """Open a dense model.

    Raises:
        UserError: It cannot be read, or no family of the package serves it and none is named.
    """
    kind = str(read_checkpoint(folder).config.get("model_type"))
    if family is None and kind not in load_shipped_families():
        raise UserError(
            f"family: no family file is shipped for the model type {kind!r}. Name the one that the search had, with "
            "--family FILE"
        )
    return open_model(folder, family)


def open_plan_model(plan: Plan, folder: Path, family: Path | None) -> tuple[Checkpoint, Layout]:
    """Open the dense model of a plan, and find the plan's units in it.

    Raises:
        UserError: The plan was made for another model, or with another family file.
    """
    checkpoint, found = open_dense(folder, family)
    if checkpoint.fingerprint != plan.model["fingerprint"]:
        raise UserError(
            f"plan: made for {plan.model['id']} ({plan.model['fingerprint'][:19]}...), and {checkpoint.folder} is "
            f"another model ({checkpoint.fingerprint[:19]}...). Name the plan's model with --model"
        )
    kinds = {unit.kind for unit in plan.space.units}
    layout = resolve_layout(
        found,
        checkpoint,
        "query_heads" if "query_heads" in kinds else "kv_groups",
        "whole" if "experts" in kinds else "inside",
    )
    _check_units(plan, layout, checkpoint)
    return checkpoint, layout


def _check_units(plan: Plan, layout: Layout, checkpoint: Checkpoint) -> None:
    """Raise if the plan's units are not those of the model."""
    # except for ladders, the units of n:m are those of unstructured pruning
    pattern = "structured" if plan.space.pattern == "structured" else "unstructured"
    expected = build_space(layout, checkpoint, pattern, target=0.5)
    there = {(u.name, u.kind, u.total, u.params[0], u.macs[0]) for u in expected.units}
    named = {(u.name, u.kind, u.total, u.params[0], u.macs[0]) for u in plan.space.units}
    if there != named or not expected.fixed.items() <= plan.space.fixed.items():
        odd = min(there ^ named)[0] if there != named else "what is outside units"
        raise UserError(
            f"plan: it and the model {checkpoint.folder} disagree on {odd}. Name the family file that it was made "
            "with, with --family FILE, or make the plan again with a search"
        )
