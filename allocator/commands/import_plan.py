"""Allocations that other tools chose, as plans: to be executed, measured and compared here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from allocator.core.budget import Budget
from allocator.core.errors import UserError
from allocator.core.files import fingerprint
from allocator.core.plan import Plan
from allocator.core.space import SearchSpace, Unit
from allocator.interop.readers.ratios import Levels, read_ratios
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import retained_matrices
from allocator.model.family.space import build_space
from allocator.model.family.sub_blocks import SubBlock
from allocator.run.config.run import RunConfig
from allocator.run.job import Job, prepare, serving, versions

_NAMED = 3
"""Units that a message names."""


def adopt(path: Path, config: RunConfig, levels: Levels | None = None) -> tuple[Plan, list[str]]:
    """Make a plan of an allocation that lies in a file.

    Every unit has a ladder of two levels, dense and what is asked for, to the nearest that its items allow; of the n:m
    pattern all have the patterns that are asked for. The budget is what the plan costs.

    Args:
        path: See :func:`~allocator.interop.readers.ratios.read_ratios`.
        config: The model, the pattern, and how and on which text to prune.
        levels: What levels mean, for a file of levels without metadata.

    Returns:
        The plan, and what rounding changed, in lines for a user.

    Raises:
        UserError: An input is wrong; a unit is not named, or its matrices are asked to lose different shares.
    """
    if config.ladder.sparsities is not None or config.pruner.inputs == "path":
        key = "ladder.sparsities" if config.ladder.sparsities is not None else "pruner.inputs=path"
        raise UserError(f"{key}: is for the ladders of a search, and an imported plan has its own. Leave it out")
    job = prepare(config)
    asked = _asked(path, job, read_ratios(path, job.layout, job.checkpoint, levels))
    space = _space(job, asked)
    allocation = tuple(_nearest(unit, asked[unit.name]) for unit in space.units)
    plan = Plan(
        model=job.model_id,
        space=space,
        allocation=allocation,
        budget=Budget(params=space.cost(allocation)),
        pruner=job.pruner_id,
        measured={},
        provenance={
            "run": fingerprint(asked),
            "searcher": "import",
            "seed": config.seed,
            "workload": job.workload_id,
            "versions": versions(),
        },
    )
    return plan, _rounding(plan, asked)


def _asked(path: Path, job: Job, ratios: Mapping[str, float]) -> dict[str, float]:
    """Return the share of every unit that shall go.

    Raises:
        UserError: One is not named, or its matrices disagree.
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
    """Return what a sub-block shall lose, which all of its matrices must agree in; None where none is named."""
    own = {module: ratios[module] for module in sub_block.modules if module in ratios}
    if not own:
        return None
    share = own.get(sub_block.output, next(iter(own.values())))
    kept = round(sub_block.total * (1 - share))
    # matrices without rows of items, as key and value of query heads, stay until all goes
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


def _space(job: Job, asked: Mapping[str, float]) -> SearchSpace:
    """Return the model's space with ladders that hold what is asked for."""
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
    return serving(config, job.checkpoint, job.layout, space)


def _nearest(unit: Unit, share: float) -> int:
    return min(range(unit.num_levels), key=lambda level: abs(unit.sparsity(level) - share))


def _rounding(plan: Plan, asked: Mapping[str, float]) -> list[str]:
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
