"""Exporting: a plan is handed to another tool."""

from __future__ import annotations

from pathlib import Path

from allocator.commands.dense_model import choose_model, open_plan_model
from allocator.core.errors import UserError, did_you_mean
from allocator.core.files import check_apart, check_new_folder, whole_folder
from allocator.core.plan import Plan
from allocator.interop.contract import Source, check_target
from allocator.interop.targets.registry import TARGETS
from allocator.run.config.run import RunConfig


def export(
    source: Path | str,
    to: str,
    out: Path | str,
    *,
    model: str | Path | None = None,
    family: Path | str | None = None,
    config: RunConfig | Path | str | None = None,
    checkpoint: Path | str | None = None,
) -> list[str]:
    """Hand a plan to another tool: write what the tool reads, and a script that verifies what the tool made.

    Args:
        source: A plan's file, or the folder of a run.
        to: A target of :data:`~allocator.interop.targets.registry.TARGETS`.
        out: A folder that does not exist yet.
        model: The dense model of the plan. If None, the model of ``config``, else the packaged model.
        family: The family file of the plan. If None, the family file of ``config``, else those of the package.
        config: A configuration or a run file that names model and family.
        checkpoint: The executed plan, for targets that carry weights. None for ``checkpoint`` next to the plan.

    Returns:
        Lines that say what the target could not take over exactly, and how to go on.

    Raises:
        UserError: There is no such target, it cannot express the plan, or ``out`` exists.
    """
    source, out = Path(source), Path(out)
    if to not in TARGETS:
        raise UserError(f"--to: unknown target {to!r}{did_you_mean(to, TARGETS)}")
    check_new_folder(out)
    folder = source if source.is_dir() else source.parent
    plan = Plan.load(source / "plan.json" if source.is_dir() else source)
    run = folder if (folder / "journal.jsonl").exists() else None
    dense, family_file = choose_model(model, family, config)
    for inside, what in ((dense, "the model"), (run, "the run")):
        if inside is not None:
            check_apart(out, inside, what)
    opened, layout = open_plan_model(plan, dense, family_file)
    default = folder / "checkpoint"
    executed = Path(checkpoint) if checkpoint is not None else default if default.is_dir() else None
    target, handed = TARGETS[to], Source(plan=plan, checkpoint=opened, layout=layout, run=run, executed=executed)
    check_target(target, handed)
    with whole_folder(out) as partial:
        return target.write(handed, partial)
