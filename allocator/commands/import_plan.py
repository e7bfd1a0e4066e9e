"""Importing: an allocation that another tool chose becomes a plan, to be executed, measured and compared here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from allocator.core.budget import Budget
from allocator.core.errors import UserError
from allocator.core.plan import Plan
from allocator.core.provenance import make_plan
from allocator.core.space import SearchSpace, Unit
from allocator.interop.readers.levels import Levels
from allocator.interop.readers.ratios import read_ratios
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import retained_matrices
from allocator.model.family.space import build_space
from allocator.model.family.sub_blocks import SubBlock
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.job import Job
from allocator.run.model import with_serving_costs
from allocator.run.prepare import prepare_job

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from allocator.run.config.options import RunOptions

_NAMED = 3
"""Units that a message names."""


class ImportedPlan(NamedTuple):
    """A plan of an allocation that another tool chose.

    Attributes:
        plan: The plan.
        notes: What rounding changed, in lines.
    """

    plan: Plan
    notes: list[str]


def import_plan(
    path: Path | str,
    *,
    model: str | Path | None = None,
    config: RunConfig | Path | str | None = None,
    level_zero: float | None = None,
    level_step: int | None = None,
    **options: Unpack[RunOptions],
) -> ImportedPlan:
    """Make a plan of an allocation that another tool chose.

    Every unit gets a ladder of two levels: dense, and the imported sparsity rounded to whole items. Units of the n:m
    pattern get the imported patterns. The budget is what the plan costs.

    Args:
        path: Shares by module (``ratios.json`` or ``modules.csv`` of ``export``), shares by block (``.npy``, a JSON
            list or text, as of OWL), or levels of EvoPress, Týr-the-Pruner or DarwinLM.
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration or a run file, which options override: the pattern, the pruner and its text.
        level_zero: The sparsity of level 0, for levels without ``metadata.pth`` next to them.
        level_step: How many weights of every matrix one level is, likewise.
        options: See :class:`~allocator.run.config.options.RunOptions`.

    Raises:
        UserError: The file cannot be understood or does not fit the model. It names no share for a unit, or several.
    """
    if (level_zero is None) != (level_step is None):
        raise UserError("levels: --level-zero and --level-step say together what levels mean. Give both, or neither")
    levels = None if level_zero is None or level_step is None else Levels(level_zero, level_step)
    settings, path = build_config(model, config, {**options, "workers": 0}), Path(path)
    if settings.ladder.sparsities is not None or settings.pruner.inputs == "path":
        key = "ladder.sparsities" if settings.ladder.sparsities is not None else "pruner.inputs=path"
        raise UserError(f"{key}: is for the ladders of a search, and an imported plan has its own. Leave it out")
    job = prepare_job(settings)
    asked = _read_shares(path, job, read_ratios(path, job.layout, job.checkpoint, levels))
    space = _build_space(job, asked)
    allocation = tuple(_nearest_level(unit, asked[unit.name]) for unit in space.units)
    budget = Budget(params=space.cost(allocation))
    header = replace(job.make_header(), space=space, budget=budget, identity=asked, method="import", training=None)
    plan = make_plan(header, allocation, budget, {})
    return ImportedPlan(plan, _describe_rounding(plan, asked))


def _read_shares(path: Path, job: Job, ratios: Mapping[str, float]) -> dict[str, float]:
    """Return the share of every unit that is to be removed.

    Raises:
        UserError: A unit is not named, or its matrices have different shares.
    """
    if job.space.pattern == "structured":
        shares = {
            sub_block.name: _share(path, sub_block, job.checkpoint, ratios) for sub_block in job.layout.sub_blocks
        }
        asked = {name: share for name, share in shares.items() if share is not None}
    else:
        asked = {unit.name: ratios[unit.name] for unit in job.space.units if unit.name in ratios}
    if missing := [unit.name for unit in job.space.units if unit.name not in asked]:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        others = ", or use --pattern structured" if job.space.pattern != "structured" else ""
        raise UserError(f"{path}: says nothing of {', '.join(missing[:_NAMED])}{more}. Name every matrix{others}")
    return asked


def _share(path: Path, sub_block: SubBlock, checkpoint: Checkpoint, ratios: Mapping[str, float]) -> float | None:
    """Return the share that all named matrices of a sub-block agree on; None if none is named."""
    own = {module: ratios[module] for module in sub_block.modules if module in ratios}
    if not own:
        return None
    share = own.get(sub_block.output, next(iter(own.values())))
    kept = round(sub_block.total * (1 - share))
    # matrices without rows of items, as key and value of query heads, are kept until the whole sub-block is removed
    beside = {module: ratios[module] for module in retained_matrices(sub_block, checkpoint) if module in ratios}
    odd = {m: s for m, s in own.items() if round(sub_block.total * (1 - s)) != kept}
    odd |= {m: s for m, s in beside.items() if s != (0.0 if kept else 1.0)}
    if odd:
        named = ", ".join(f"{s:.4g} ({m.removeprefix(sub_block.parent)[1:]})" for m, s in {**own, **beside}.items())
        raise UserError(
            f"{path}: the matrices of {sub_block.name} lose {sub_block.kind} together, and are asked to lose "
            f"{named}. Give them one share, see --set ladder.attention, or use --pattern unstructured"
        )
    return share


def _build_space(job: Job, asked: Mapping[str, float]) -> SearchSpace:
    """Return the model's space with ladders that hold the imported sparsities."""
    config = job.config
    patterns = config.ladder.patterns
    if config.pattern == "n:m":
        group = int(patterns[0].split(":")[1])
        counts = {round(group * (1 - share)) for share in asked.values()} - {group}
        counts |= {int(pattern.split(":")[0]) for pattern in patterns}
        patterns = tuple(f"{count}:{group}" for count in sorted(counts, reverse=True))
    space = build_space(
        job.layout,
        job.checkpoint,
        config.pattern,
        target=0.5,
        ladder={unit: [share] for unit, share in asked.items()},
        align=config.ladder.align,
        patterns=patterns,
        bias=config.pruner.bias,
    )
    return with_serving_costs(config, job.checkpoint, job.layout, space)


def _nearest_level(unit: Unit, share: float) -> int:
    return min(range(unit.num_levels), key=lambda level: abs(unit.sparsity(level) - share))


def _describe_rounding(plan: Plan, asked: Mapping[str, float]) -> list[str]:
    space = plan.space
    errors = {
        unit.name: abs(unit.sparsity(level) - asked[unit.name])
        for unit, level in zip(space.units, plan.allocation, strict=True)
    }
    worst = max(errors, key=errors.__getitem__)
    return [
        f"{space.cost(plan.allocation):,} parameters, {space.sparsity(plan.allocation):.2%} of units removed",
        f"rounding to whole items changes a unit by up to {errors[worst]:.4f} of it ({worst}), by "
        f"{sum(errors.values()) / len(errors):.4f} on average",
    ]
