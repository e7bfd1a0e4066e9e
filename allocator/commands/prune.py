"""Pruning: a plan is executed as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allocator.commands.dense_model import choose_model, open_plan_model
from allocator.core.errors import UserError
from allocator.core.files import check_apart, check_new_folder, fingerprint
from allocator.core.plan import Plan
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.data.read import read_examples
from allocator.model.family.layout import Layout
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.levels.store import LevelStore, open_store
from allocator.pruning.pruners.protocol import LocalPruner, PrunerSpec
from allocator.pruning.pruners.registry import make_pruner
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.model import fingerprint_ladders, read_texts
from allocator.run.reporting import Reporter, Silent

_NEEDED = {"name", "calibration", "inputs", "execution", "tokens", "sequence_length", "dtype", "threads"}
"""What a plan must say of its local pruner, so that its weights can be made again."""


def prune(  # noqa: PLR0913 - a public entry point
    plan: Plan | Path | str,
    out: Path | str,
    *,
    model: str | Path | None = None,
    text: Path | str | Sequence[Path | str] | None = None,
    family: Path | str | None = None,
    config: RunConfig | Path | str | None = None,
    execution: str | None = None,
    store: Path | str | None = None,
    pruner: LocalPruner | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Execute a plan: write the pruned checkpoint, and return the number of parameters in it.

    Args:
        plan: A plan or its file.
        out: A folder that does not exist yet.
        model: The dense model of the plan. None for that of ``config``, or for the packaged model.
        text: The calibration text of the plan, or the texts of its run's domains in their order. None for that of
            ``config``, or for the Python standard library.
        family: The family file of the plan. None for that of ``config``, or for those of the package.
        config: A configuration or a run file that names model, text and family.
        execution: ``recompute`` prunes block by block on what pruned predecessors produce. ``assemble`` takes the
            levels that the search saw. None for what the plan says.
        store: A level store of the same model, text and pruner, for ``assemble``. None to prune every level again.
        pruner: The local pruner of a plan whose run was given one from Python. None for what the plan says.
        reporter: Receives progress.

    Raises:
        UserError: The plan is for another model, the text is another, or ``out`` exists.
    """
    if execution not in (None, "assemble", "recompute"):
        raise UserError(f"execution: expected assemble or recompute, found {execution!r}")
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    folder, family_file = choose_model(model, family, config)
    reporter, out = reporter or Silent(), Path(out)
    check_new_folder(out)
    check_apart(out, folder, "the model")
    checkpoint, layout = open_plan_model(plan, folder, family_file)
    if missing := sorted(_NEEDED - plan.pruner.keys()):
        raise UserError(
            f"plan: its pruner does not say {', '.join(missing)}, so that its weights cannot be made here. "
            "Give a plan that a search made"
        )
    execution = execution or plan.pruner["execution"]
    if store is not None:
        opened = _open_store(plan, checkpoint, Path(store), execution)
        return save_pruned(plan.allocation, checkpoint, layout, plan.space, opened, out)
    texts = _choose_texts(text, config)
    levels = _prune_levels(plan, checkpoint, layout, execution, texts, pruner, reporter)
    return save_pruned(plan.allocation, checkpoint, layout, plan.space, levels.__getitem__, out)


def find_store_of(plan: Plan, file: Path, execution: str | None) -> Path | None:
    """Return the level store next to a plan's file, if the plan is to be assembled and a finished store is there."""
    beside = file.parent / "levels"
    assembled = (execution or plan.pruner["execution"]) == "assemble"
    return beside if assembled and (beside / "manifest.json").exists() else None


def _open_store(plan: Plan, checkpoint: Checkpoint, store: Path, execution: str) -> LevelStore:
    """Return the level store that a plan is assembled from."""
    if execution == "recompute":
        raise UserError(
            f"store: {store} serves plans that are put together from it, and this one is pruned along its own path. "
            "Leave --store out, or ask for --execution assemble"
        )
    settings = {key: value for key, value in plan.pruner.items() if key != "execution"}
    key = {
        "model": checkpoint.fingerprint,
        "calibration": settings["calibration"],
        "pruner": fingerprint(settings),
        "space": fingerprint_ladders(plan.space),
    }
    opened = open_store(store, key)
    if opened is None:
        raise UserError(f"store: {store}: no finished level store. Leave --store out to prune afresh")
    return opened


def _choose_texts(
    text: Path | str | Sequence[Path | str] | None, config: RunConfig | Path | str | None
) -> dict[str, Path | None]:
    """Return the calibration texts by name: those named, or those of a configuration."""
    if isinstance(text, (str, Path)):
        return {str(text): Path(text)}
    if text is not None:
        return {str(each): Path(each) for each in text}
    settings = build_config(config=config)
    return dict(settings.domains) or {str(settings.text): settings.text}


def _prune_levels(
    plan: Plan,
    checkpoint: Checkpoint,
    layout: Layout,
    execution: str,
    texts: Mapping[str, Path | None],
    pruner: LocalPruner | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the compact levels of every unit, pruned as the plan says."""
    settings = plan.pruner
    split, length = {"calibration": settings["tokens"]}, settings["sequence_length"]
    if len(texts) > 1:
        examples = read_texts(texts, checkpoint, split, length)["calibration"]
    else:
        examples = read_examples(next(iter(texts.values())), checkpoint, split, length)["calibration"]
    if examples.fingerprint() != settings["calibration"]:
        raise UserError(
            "text: the plan was made with other calibration text. Name the same with --text, run the same Python "
            "version if it was the standard library, or put the plan together from its run's level store with "
            "--execution assemble --store FOLDER"
        )
    pruner = pruner or make_pruner(PrunerSpec.from_plan(settings), plan.space.pattern)
    reporter.start_phase("pruning", len(layout.blocks))
    spec = EngineSpec(
        checkpoint=checkpoint,
        layout=layout,
        space=plan.space,
        pruner=pruner,
        dtype=settings["dtype"],
        threads=settings["threads"],
    )
    calibration = spec.calibration(examples, reporter.advance, reporter.notify)
    if execution == "recompute":
        return dict(prune_on_pruned_inputs(calibration, plan.allocation, every_level=False))
    if settings["inputs"] == "dense":
        return dict(prune_on_dense_inputs(calibration))
    return dict(prune_on_pruned_inputs(calibration, settings.get("along"), every_level=True))
