"""Inspecting: the search space of a model, from its configuration and headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allocator.commands.alignment import alignment
from allocator.core.budget import budget_for
from allocator.core.costs import from_units
from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import locate, read_checkpoint
from allocator.model.family.draft import Covered, draft_family, list_coverage
from allocator.model.family.layout import apply_family_names
from allocator.model.family.schema import find_family, load_shipped_families
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.model import describe_texts, read_model
from allocator.run.prepare import read_splits
from allocator.searchers.rules.baselines import uniform

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from allocator.run.config.options import RunOptions


class Inspection(NamedTuple):
    """What can be searched in a model.

    Attributes:
        space: The units with their ladders and exact costs.
        summary: Parameters, budget, the uniform baseline and the units as plain data.
    """

    space: SearchSpace
    summary: dict[str, Any]


def inspect(
    model: str | Path | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    **options: Unpack[RunOptions],
) -> Inspection:
    """Read the search space of a model, and how much of a text the splits hold. No weight is loaded.

    Args:
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration or a run file, which options override.
        options: See :class:`~allocator.run.config.options.RunOptions`.

    Raises:
        UserError: The model cannot be used, the budget is out of reach, or the text is too short.
    """
    settings = build_config(model, config, options)
    checkpoint, _, space = read_model(settings)
    budget = budget_for(space, settings.target, settings.bounds)
    text = describe_texts(read_splits(settings, checkpoint)) if settings.text or settings.domains else []
    even = uniform(space, budget)
    aligned = alignment(settings, space, budget)
    summary = {
        "model": str(checkpoint.folder),
        "architecture": checkpoint.architecture,
        "pattern": space.pattern,
        "params": {"dense": space.cost(space.dense), "in_units": space.unit_params, "fixed": space.fixed["params"]},
        "macs_per_token": {"dense": space.cost(space.dense, "macs"), "fixed": space.fixed["macs"]},
        "asked": settings.asked,
        "budget": {cost: from_units(cost, limit) for cost, limit in budget.limits.items()},
        "uniform": {"params": space.cost(even), "sparsity": round(space.sparsity(even), 6)},
        "units": space.to_json()["units"],
        **({"align": aligned} if aligned else {}),
        **({"text": text} if text else {}),
    }
    return Inspection(space, summary)


def explain(
    model: str | Path | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    **options: Unpack[RunOptions],
) -> list[Covered]:
    """Return every matrix of a model with the unit that covers it. Nothing is covered if no family serves the model.

    Args:
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration or a run file, which options override.
        options: See :class:`~allocator.run.config.options.RunOptions`; ``family`` names the family file.

    Raises:
        UserError: The model or the family file cannot be read.
    """
    settings = build_config(model, config, options)
    checkpoint = read_checkpoint(locate(settings.model))
    kind = str(checkpoint.config.get("model_type"))
    family = load_shipped_families().get(kind) if settings.family is None else find_family(kind, settings.family)
    return list_coverage(checkpoint if family is None else apply_family_names(family, checkpoint), family)


def suggest_family(model: str | Path | None = None, *, config: RunConfig | Path | str | None = None) -> str:
    """Draft a family file for a model from its names and shapes, and return it as YAML.

    Args:
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration or a run file.

    Raises:
        UserError: The model cannot be read, or has no numbered blocks.
    """
    return draft_family(read_checkpoint(locate(build_config(model, config).model)))
