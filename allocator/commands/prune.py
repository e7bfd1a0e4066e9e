"""Pruning: making the checkpoint of a plan."""

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
from allocator.pruning.pruners.protocol import LocalPruner
from allocator.pruning.pruners.registry import choose_plan_pruner
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.model import fingerprint_ladders, read_texts
from allocator.run.reporting import Reporter, Silent

_NEEDED = {"name", "calibration", "inputs", "execution", "tokens", "sequence_length", "dtype", "threads"}
"""Keys of a plan's pruner that are needed to prune the weights again."""


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
    """Write the pruned checkpoint of a plan, and return its number of parameters.

    Args:
        plan: A plan or its file.
        out: A folder that does not exist yet.
        model: The dense model of the plan. If None, the model of ``config``, else the packaged model.
        text: The calibration text of the plan. If the run had domains, the texts of the domains in the same order. If
            None, the text or domains of ``config``. ``python`` for the Python standard library.
        family: The family file of the plan. If None, the family file of ``config``, else the package's families.
        config: A configuration or a run file that names the model, the text and the family file.
        execution: ``recompute`` prunes block by block, on the outputs of pruned predecessors. ``assemble`` uses the
            levels that the search measured. If None, the execution that the plan names.
        store: A level store of the same model, text and pruner, for ``assemble``. None to prune every level again.
        pruner: Your own local pruner, with which the plan was made. If None, the pruner that the plan names.
        reporter: Receives progress.

    Raises:
        UserError: The plan is for another model, the text or the pruner is not the plan's, or ``out`` exists.
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
            f"plan: its pruner lacks {', '.join(missing)}, so the weights cannot be pruned again. "
            "Use a plan that a search made"
        )
    execution = execution or plan.pruner["execution"]
    if store is not None:
        opened = _open_store(plan, checkpoint, Path(store), execution)
        return save_pruned(plan.allocation, checkpoint, layout, plan.space, opened, out)
    pruner = choose_plan_pruner(plan.pruner, plan.space.pattern, pruner)
    texts = _choose_texts(text, config)
    levels = _prune_levels(plan, checkpoint, layout, execution, texts, pruner, reporter)
    return save_pruned(plan.allocation, checkpoint, layout, plan.space, levels.__getitem__, out)


def find_store_of(plan: Plan, file: Path, execution: str | None) -> Path | None:
    """Return the finished level store next to a plan's file. None if there is none, or the plan is recomputed."""
    beside = file.parent / "levels"
    assembled = (execution or plan.pruner["execution"]) == "assemble"
    return beside if assembled and (beside / "manifest.json").exists() else None


def _open_store(plan: Plan, checkpoint: Checkpoint, store: Path, execution: str) -> LevelStore:
    """Return the level store that a plan is assembled from."""
    if execution == "recompute":
        raise UserError(
            f"store: {store} can only be used to assemble a plan, and the execution of this plan is recompute. "
            "Leave --store out, or use --execution assemble"
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
        raise UserError(f"store: {store}: no finished level store. Leave --store out to prune every level again")
    return opened


def _choose_texts(
    text: Path | str | Sequence[Path | str] | None, config: RunConfig | Path | str | None
) -> dict[str, Path | None]:
    """Return the calibration texts by name: the given texts, or the texts of the configuration if none is given."""
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
    pruner: LocalPruner,
    reporter: Reporter,
) -> dict[str, Any]:
    """Return the compact levels of every unit, pruned with the plan's settings."""
    settings = plan.pruner
    split, length = {"calibration": settings["tokens"]}, settings["sequence_length"]
    if len(texts) > 1:
        examples = read_texts(texts, checkpoint, split, length)["calibration"]
    else:
        examples = read_examples(next(iter(texts.values())), checkpoint, split, length)["calibration"]
    if examples.fingerprint() != settings["calibration"]:
        raise UserError(
            "text: the plan was made with other calibration text. Give the plan's text with --text. If that text was "
            "the Python standard library, use the same Python version. You can also assemble the plan from the level "
            "store of its run, with --execution assemble --store FOLDER"
        )
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
