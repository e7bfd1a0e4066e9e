"""The package from Python: the same verbs as on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allocator.commands.alignment import alignment
from allocator.commands.compare import comparison_config, run_comparison
from allocator.commands.import_plan import adopt
from allocator.commands.search import Result, run_search
from allocator.core.budget import Budget, budget_for
from allocator.core.costs import Bound, format_cost, from_units
from allocator.core.errors import UserError, did_you_mean
from allocator.core.files import check_apart, check_file, check_new_folder, fingerprint, whole_folder
from allocator.core.front import figure, pareto_front
from allocator.core.front import knee as find_knee
from allocator.core.journal import Journal
from allocator.core.latency import LatencySettings, LatencyTable
from allocator.core.outcomes import list_objectives, read_front, select_comparable
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.engine import Engine
from allocator.evaluation.latency import make_table
from allocator.evaluation.spec import EngineSpec, check_device
from allocator.interop.contract import Source
from allocator.interop.contract import check as check_target
from allocator.interop.readers.ratios import Levels
from allocator.interop.targets.registry import TARGETS
from allocator.model.checkpoint.headers import Checkpoint, locate, read_checkpoint
from allocator.model.data.read import read_examples
from allocator.model.family.draft import Covered, coverage, draft
from allocator.model.family.layout import Layout, named_by, resolve_layout
from allocator.model.family.schema import Family, find_family, served_types
from allocator.model.family.serving_costs import check_timed
from allocator.model.family.space import build_space
from allocator.model.live.load import check_stock
from allocator.model.live.write import count_params
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.levels.store import open_store
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner
from allocator.run.config.load import load_config
from allocator.run.config.run import RunConfig
from allocator.run.job import check_length, ladders_id, read_model, read_texts, versions
from allocator.run.reporting import Reporter, Silent
from allocator.searchers.hypervolume import box
from allocator.searchers.rules.baselines import uniform

_PRUNER_KEYS = {"name", "calibration", "inputs", "execution", "tokens", "sequence_length", "dtype", "threads"}
"""What a plan says of its local pruner, so that its weights can be made again."""


def search(
    model: str | Path | None = None,
    *,
    target: float | None = None,
    constraints: Sequence[str] | None = None,
    objectives: Sequence[str] | None = None,
    pattern: str | None = None,
    workers: int | None = None,
    method: str | None = None,
    budget: str | None = None,
    seed: int | None = None,
    name: str | None = None,
    runs_dir: Path | str | None = None,
    text: Path | str | None = None,
    address: str | None = None,
    config: Path | str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Run the whole line: level store, search, plan, checkpoint, measured figures.

    Args:
        model: A Hugging Face folder or hub id; None for the packaged model.
        target: Share of the parameters inside units to remove, in (0, 1).
        constraints: Bounds on costs of the whole model, such as ``"latency_ms <= 12"`` or ``"kv_bytes <= 0.5x"``.
        objectives: Costs that shall be small beside the loss, such as ``["params"]``: the answer is then a front.
        pattern: ``structured``, ``unstructured`` or ``n:m``.
        workers: Ray workers; 0 runs in this process.
        method: How to search; None for ``auto``. See :class:`~allocator.searchers.decide.SearchSettings`.
        budget: What the search may spend, such as ``"300 evaluations"``, ``"2e6 tokens"`` or ``"20 minutes"``.
        seed: Of the search.
        name: Of the run, a folder under ``runs_dir``.
        runs_dir: The folder of runs.
        text: Text for calibration, search, selection and test; None for the Python standard library.
        address: A running Ray cluster; None for a local one.
        config: A run file, overridden by the arguments.
        settings: Any other key, such as ``"search.evolution.generations=10"``.
        resume: Continue the run of this name.
        reporter: Hears about progress.

    Raises:
        UserError: An input is wrong; the message says what to do, and nothing was written.
    """
    flags = {
        "model": None if model is None else str(model),
        "target": target,
        "constraints": constraints,
        "objectives": objectives,
        "pattern": pattern,
        "workers": workers,
        "seed": seed,
        "name": name,
        "runs_dir": runs_dir,
        "text": text,
        "address": address,
    }
    given = [*search_assignments(method, budget), *settings]
    return run_search(load_config(None if config is None else Path(config), flags, given, resume), resume, reporter)


def compare(
    model: str | Path | None = None,
    *,
    target: float | None = None,
    constraints: Sequence[str] | None = None,
    pattern: str | None = None,
    rules: Sequence[str] = (),
    plans: Sequence[Path | str] = (),
    workers: int | None = None,
    name: str | None = None,
    runs_dir: Path | str | None = None,
    text: Path | str | None = None,
    address: str | None = None,
    config: Path | str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Put the field's allocation rules, and plans, side by side at one budget, on held-out text.

    Args:
        model: A Hugging Face folder or hub id; None for the packaged model.
        target: Share of the parameters inside units to remove, in (0, 1).
        constraints: Bounds on costs of the whole model, such as ``"latency_ms <= 12"`` or ``"kv_bytes <= 0.5x"``.
        pattern: ``structured``, ``unstructured`` or ``n:m``.
        rules: Names of rules; none for all that serve the pattern, or for none if there are plans.
        plans: Files of plans for the same model and pattern.
        workers: Ray workers; 0 runs in this process.
        name: Of the comparison, a folder under ``runs_dir``.
        runs_dir: The folder of runs.
        text: Text for calibration, search, selection and test; None for the Python standard library.
        address: A running Ray cluster; None for a local one.
        config: A run file, overridden by the arguments.
        settings: Any other key, such as ``"tokens.test=8192"``.
        resume: Continue the comparison of this name; what it measured is not measured again.
        reporter: Hears about progress.

    Returns:
        The content of ``compare.json``: under ``measured``, for each rule or plan, ``params``, ``sparsity``,
        ``within_budget``, ``kl``, ``nll`` and ``perplexity``.

    Raises:
        UserError: An input is wrong; the message says what to do, and nothing was written.
    """
    flags = {
        "model": None if model is None else str(model),
        "target": target,
        "constraints": constraints,
        "pattern": pattern,
        "workers": workers,
        "name": name,
        "runs_dir": runs_dir,
        "text": text,
        "address": address,
    }
    given = comparison_config(None if config is None else Path(config), flags, settings, resume)
    return run_comparison(given, rules, [Path(plan) for plan in plans], resume, reporter)


def inspect(config: RunConfig) -> tuple[SearchSpace, dict[str, Any]]:
    """Return the search space of a model and a summary, from its configuration and headers alone.

    Raises:
        UserError: The model cannot be used, or the target is out of reach.
    """
    files, _, space = read_model(config)
    budget = budget_for(space, config.target, config.bounds)
    even = uniform(space, budget)
    summary = {
        "model": str(files.folder),
        "architecture": files.architecture,
        "pattern": space.pattern,
        "params": {"dense": space.cost(space.dense), "in_units": space.unit_params, "fixed": space.fixed["params"]},
        "macs_per_token": {"dense": space.cost(space.dense, "macs"), "fixed": space.fixed["macs"]},
        "asked": config.asked,
        "budget": {cost: from_units(cost, limit) for cost, limit in budget.limits.items()},
        "uniform": {"params": space.cost(even), "sparsity": round(space.sparsity(even), 6)},
        "units": space.to_json()["units"],
    }
    aligned = alignment(config, space, budget)
    return space, {**summary, **({"align": aligned} if aligned else {})}


def explain(config: RunConfig) -> list[Covered]:
    """Return every matrix of a model with what covers it in its family; in none, where no family serves the model.

    Raises:
        UserError: The model or the family file cannot be read.
    """
    files = read_checkpoint(locate(config.model))
    kind = str(files.config.get("model_type"))
    family = served_types().get(kind) if config.family is None else find_family(kind, config.family)
    return coverage(files if family is None else named_by(family, files), family)


def suggest(config: RunConfig) -> str:
    """Return a family file for a model, drafted from its names and shapes.

    Raises:
        UserError: The model cannot be read, or has no numbered blocks.
    """
    return draft(read_checkpoint(locate(config.model)))


def latency(config: RunConfig, out: Path | str, repeats: int = 20, reporter: Reporter | None = None) -> LatencyTable:
    """Measure how long a model's sub-blocks take at every shape on this device, and write the table.

    Args:
        config: The model, its ladders, and under ``workload`` what it is to serve; ``dtype``, ``device`` and
            ``threads`` are those of the measurement.
        out: The table's file.
        repeats: Measurements of each figure.
        reporter: Hears about progress.

    Raises:
        UserError: The model cannot be used, or the file cannot be written.
    """
    out, work = Path(out), config.workload
    check_file(out, "--out")
    check_device(config.device)
    dense = config.model_copy(update={"pattern": "structured", "workload": work.model_copy(update={"latency": None})})
    files, layout, space = read_model(dense)
    check_timed(layout)
    if not files.kind.generates:
        raise UserError(f"latency: {files.architecture} does not generate, and times are those of generation")
    reporter = reporter or Silent()
    reporter.phase("measuring", max(unit.num_levels for unit in space.units))
    settings = LatencySettings(
        batch=work.batch,
        prompt=work.prompt,
        generate=work.generate,
        dtype=config.dtype,
        threads=config.threads,
        repeats=repeats,
    )
    table = make_table(files, layout, space, settings, config.device, versions(), reporter.step)
    table.save(out)
    return table


def plan_from_run(
    folder: Path | str,
    target: float | None = None,
    *,
    where: Sequence[str] = (),
    best: str | None = None,
    knee: bool = False,
    index: int | None = None,
) -> Plan:
    """Return the plan of a finished run, or another point of what a run measured.

    Args:
        folder: The run, finished or not.
        target: Share to remove; the point of lowest loss among those that remove at least as much.
        where: Bounds on costs or measured figures that the point keeps, such as ``"latency_ms <= 12"``.
        best: The figure of which the point has least; None for the loss.
        knee: The knee of those members of the front that keep the bounds, instead.
        index: The member of the front of this number, instead.

    Raises:
        UserError: The run has no such plan.
    """
    folder = Path(folder)
    if (index is not None) + knee + (best is not None) > 1 or (index is not None and (where or target is not None)):
        raise UserError("plan: --index, --knee and --best exclude each other, and --index any bound. Name one")
    if target is None and not where and best is None and not knee and index is None:
        return Plan.load(folder / "plan.json")
    journal = Journal.read(folder / "journal.jsonl")
    header, space = journal.header, journal.space
    if index is not None:
        listed = read_front(folder / "front.json")["points"]
        if not 0 <= index < len(listed):
            raise UserError(f"{folder}: the front has members 0 to {len(listed) - 1}, and {index} was asked for")
        member = tuple(listed[index]["allocation"])
        known = {outcome.request.allocation: outcome for outcome in select_comparable(journal)}
        if member not in known:
            raise UserError(
                f"{folder}: front.json and journal.jsonl are not of one run. Restore one, or resume the run"
            )
        chosen = known[member]
    else:
        chosen = _choose(folder, journal, target, where, best, knee)
    allocation = chosen.request.allocation
    return Plan(
        model=header.model,
        space=space,
        allocation=allocation,
        budget=_budget(journal, allocation),
        pruner=header.pruner,
        measured={"search_split": dict(chosen.measured)},
        provenance={
            "run": fingerprint(header.identity),
            "searcher": header.method,
            "seed": header.seed,
            **({} if target is None else {"target": target}),
            "workload": header.workload,
            **({} if header.training is None else {"training": header.training}),
            "versions": header.versions,
        },
    )


def _budget(journal: Journal, allocation: Allocation) -> Budget:
    """Return what an allocation of a run costs of each cost that is minimised; the run's own budget where none is."""
    space, names = journal.space, list_objectives(journal)
    return Budget(**({n: space.cost(allocation, n) for n in names if n in space.fixed} or journal.header["budget"]))


def _choose(
    folder: Path, journal: Journal, target: float | None, where: Sequence[str], best: str | None, at_knee: bool
) -> Outcome:
    """Return what a run measured within bounds that has least of a figure, or is the knee of their front."""
    space, within = journal.space, select_comparable(journal)
    if not within:
        raise UserError(f"{folder}: nothing is measured on all tokens yet. Resume the search")
    known = {*space.fixed, *within[0].measured}
    if best is not None and best not in known:
        raise UserError(f"--best: unknown figure {best!r}{did_you_mean(best, known)}")
    bounds = [(text, Bound.parse(text, known)) for text in where]
    for text, bound in bounds:
        if bound.relative and bound.name not in space.fixed:
            raise UserError(
                f"--where {text!r}: {bound.name} is measured, and has no share of the dense model's. Give a number"
            )
    limits: list[tuple[str, str, Any]] = [
        # a figure that is named to its last digit keeps the bound: as a float, not as the fraction that its digits are
        (text, bound.name, bound.limit(space) if bound.name in space.fixed else float(bound.amount))
        for text, bound in bounds
    ]
    if target is not None:
        limits.append((f"target {target}", "params", budget_for(space, target).limits["params"]))
    for text, name, limit in limits:
        kept = [outcome for outcome in within if figure(space, outcome, name) <= limit]
        if not kept:
            least = min((figure(space, outcome, name) for outcome in within), default=0.0)
            least_shown = format_cost(name, int(least)) if name in space.fixed else f"{least:.4f}"
            raise UserError(
                f"{folder}: nothing that was measured keeps {text}; the least {name} is {least_shown}. "
                "Allow more, or search with that constraint"
            )
        within = kept
    if at_knee:
        names = list_objectives(journal)
        front = pareto_front(space, within, names)
        figures = np.array([[figure(space, outcome, name) for name in names] for outcome in front])
        return front[find_knee(figures, *box(journal, names))]
    name = best or journal.loss
    return min(within, key=lambda outcome: (figure(space, outcome, name), outcome.loss, outcome.request.allocation))


def prune(
    plan: Plan | Path | str,
    out: Path | str,
    *,
    model: str | Path,
    execution: str | None = None,
    store: Path | str | None = None,
    text: Path | str | Sequence[Path | str] | None = None,
    family: Path | str | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Execute a plan: write the pruned checkpoint, and return the parameters counted in it.

    Args:
        plan: A plan or its file.
        out: A folder that does not exist yet.
        model: The dense model that the plan was made for.
        execution: ``recompute`` prunes block by block on what the pruned predecessors produce; ``assemble`` takes
            the levels that the search saw, from ``store`` where given. None for what the plan says.
        store: A level store of the same model, text and pruner, for ``assemble``.
        text: The calibration text that the plan was made with, those of its run's domains in their order, or None for
            the Python standard library.
        family: The family file that the plan was made with; None for those shipped.
        reporter: Hears about progress.

    Raises:
        UserError: The plan is for another model, the text is another, or ``out`` exists.
    """
    if execution not in (None, "assemble", "recompute"):
        raise UserError(f"execution: expected assemble or recompute, found {execution!r}")
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    reporter, out = reporter or Silent(), Path(out)
    check_new_folder(out)
    check_apart(out, locate(model), "the model")
    files, layout = _model_of(plan, model, family)
    if missing := sorted(_PRUNER_KEYS - plan.pruner.keys()):
        raise UserError(
            f"plan: its pruner does not say {', '.join(missing)}, so that its weights cannot be made here. "
            "Give a plan that a search made"
        )
    settings = {key: value for key, value in plan.pruner.items() if key != "execution"}
    execution = execution or plan.pruner["execution"]
    if store is not None and execution == "recompute":
        raise UserError(
            f"store: {store} serves plans that are put together from it, and this one is pruned along its own path. "
            "Leave --store out, or ask for --execution assemble"
        )
    if store is not None and execution == "assemble":
        key = {
            "model": files.fingerprint,
            "calibration": settings["calibration"],
            "pruner": fingerprint(settings),
            "space": ladders_id(plan.space),
        }
        opened = open_store(Path(store), key)
        if opened is None:
            raise UserError(f"store: {store}: no finished level store. Leave --store out to prune afresh")
        return save_pruned(plan.allocation, files, layout, plan.space, opened, out)
    length, wanted = settings["sequence_length"], settings["tokens"]
    named = [text] if text is None or isinstance(text, (str, Path)) else text
    texts = {str(each): None if each is None else Path(each) for each in named}
    split = {"calibration": wanted}
    if len(texts) > 1:
        examples = read_texts(texts, files, split, length)["calibration"]
    else:
        examples = read_examples(next(iter(texts.values())), files, split, length)["calibration"]
    if examples.fingerprint() != settings["calibration"]:
        raise UserError(
            "text: the plan was made with other calibration text. Name the same with --text, run the same Python "
            "version if it was the standard library, or put the plan together from its run's level store with "
            "--execution assemble --store FOLDER"
        )
    pruner = make_pruner(PrunerSpec.from_plan(settings), plan.space.pattern)
    reporter.phase("pruning", len(layout.blocks))
    spec = EngineSpec(
        checkpoint=files,
        layout=layout,
        space=plan.space,
        pruner=pruner,
        dtype=settings["dtype"],
        threads=settings["threads"],
    )
    calibration = spec.calibration(examples, reporter.step, reporter.say)
    if execution == "recompute":
        made = prune_on_pruned_inputs(calibration, plan.allocation, every_level=False)
    elif settings["inputs"] == "dense":
        made = prune_on_dense_inputs(calibration)
    else:
        made = prune_on_pruned_inputs(calibration, settings.get("along"), every_level=True)
    compact = dict(made)
    return save_pruned(plan.allocation, files, layout, plan.space, compact.__getitem__, out)


def export(
    source: Path | str,
    to: str,
    out: Path | str,
    *,
    model: str | Path,
    checkpoint: Path | str | None = None,
    family: Path | str | None = None,
) -> list[str]:
    """Hand a plan to another tool: write what it reads, and how to verify what it made.

    Args:
        source: A plan's file, or the folder of a run.
        to: A target; :data:`allocator.interop.targets.registry.TARGETS` has them all.
        out: A folder that does not exist yet.
        model: The dense model that the plan was made for.
        checkpoint: The executed plan, for targets that carry weights. None for ``checkpoint`` beside the plan.
        family: The family file that the plan was made with; None for those shipped.

    Returns:
        What the target could not take over exactly, and how to go on, in lines.

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
    for inside, what in ((locate(model), "the model"), (run, "the run")):
        if inside is not None:
            check_apart(out, inside, what)
    files, layout = _model_of(plan, model, family)
    beside = folder / "checkpoint"
    there = Path(checkpoint) if checkpoint is not None else beside if beside.is_dir() else None
    target, handed = TARGETS[to], Source(plan, files, layout, run, there)
    check_target(target, handed)
    with whole_folder(out) as partial:
        return target.write(handed, partial)


def import_plan(
    path: Path | str,
    *,
    model: str | Path | None = None,
    pattern: str | None = None,
    text: Path | str | None = None,
    level_zero: float | None = None,
    level_step: int | None = None,
    settings: Sequence[str] = (),
) -> tuple[Plan, list[str]]:
    """Make a plan of an allocation that another tool chose, to be executed, measured and compared here.

    Args:
        path: Shares that go by module (``ratios.json`` or ``modules.csv`` of ``export``), shares by block (``.npy``, a
            JSON list or text, as of OWL), or levels of EvoPress, Týr-the-Pruner or DarwinLM.
        model: A Hugging Face folder or hub id; None for the packaged model.
        pattern: ``structured``, ``unstructured`` or ``n:m``.
        text: Calibration text; None for the Python standard library.
        level_zero: The sparsity of level 0, for levels without ``metadata.pth`` beside them.
        level_step: How many weights of every matrix a level is, likewise.
        settings: Any other key of a run file, such as ``"pruner.name=wanda"``.

    Returns:
        The plan, and what rounding changed, in lines.

    Raises:
        UserError: The file cannot be understood, or does not fit the model.
    """
    if (level_zero is None) != (level_step is None):
        raise UserError("levels: --level-zero and --level-step say together what levels mean. Give both, or neither")
    levels = None if level_zero is None or level_step is None else Levels(level_zero, level_step)
    flags = {"model": None if model is None else str(model), "pattern": pattern, "text": text, "workers": 0}
    return adopt(Path(path), load_config(None, flags, settings), levels)


def evaluate(
    checkpoint: Path | str,
    *,
    model: str | Path,
    text: Path | str | None = None,
    family: Path | str | None = None,
    tokens: int = 16384,
    length: int = 512,
) -> dict[str, float]:
    """Measure a checkpoint on the test split: parameters, what text or labels say of it, and how far it is from dense.

    Args:
        checkpoint: A pruned or dense folder with the dense model's blocks.
        model: The dense model.
        text: Where the text is, or other examples; None for the Python standard library.
        family: A family file in place of those shipped.
        tokens: How many tokens of the test split.
        length: Tokens per sequence, and what other examples count as.

    Returns:
        ``params`` (zeros in prunable matrices are not counted), ``kl`` and ``nll`` (nats per token), ``perplexity``;
        of models without logits ``hidden`` in place of these, and the ``accuracy`` of those that classify.

    Raises:
        UserError: A folder cannot be read, or the text is too short.
    """
    if tokens % length:
        raise UserError(f"tokens: {tokens} is not a multiple of the sequence length {length}")
    (files, named), pruned = _opened(model, family), read_checkpoint(locate(checkpoint))
    check_length(files, length, "length")
    dense, own = _shape(files), _shape(pruned)
    if own != dense:
        raise UserError(
            f"{pruned.folder}: made from {own}, and {files.folder} is {dense}. "
            "Name the dense model that it was made from with --model"
        )
    pattern = "structured" if "pruned" in pruned.config else "unstructured"
    layout = resolve_layout(named, files, experts="whole" if pattern == "structured" else "inside")
    examples = read_examples(None if text is None else Path(text), files, {"test": tokens}, length)
    space = build_space(layout, files, pattern, target=0.5)
    engine = Engine(EngineSpec(checkpoint=files, layout=layout, space=space), examples)
    return {
        "params": count_params(pruned.folder, space, files),
        **engine.measure_checkpoint(pruned.folder, "test", tokens),
    }


def _opened(model: Path | str, family: Path | str | None) -> tuple[Checkpoint, Family]:
    """Return a model and its family, whose tensors are what its class makes of its configuration."""
    files = read_checkpoint(locate(model))
    kind = str(files.config.get("model_type"))
    if family is None and kind not in served_types():
        raise UserError(
            f"family: no family file is shipped for the model type {kind!r}. Name the one that the search had, with "
            "--family FILE"
        )
    own = find_family(kind, None if family is None else Path(family))
    files = named_by(own, files)
    check_stock(files, own)
    return files, own


def _model_of(plan: Plan, model: Path | str, family: Path | str | None) -> tuple[Checkpoint, Layout]:
    """Return the model that a plan was made for, and where the plan's units are in it."""
    files, named = _opened(model, family)
    if files.fingerprint != plan.model["fingerprint"]:
        raise UserError(
            f"plan: made for {plan.model['id']} ({plan.model['fingerprint'][:19]}...), and {files.folder} is another "
            f"model ({files.fingerprint[:19]}...). Name the plan's model with --model"
        )
    kinds = {unit.kind for unit in plan.space.units}
    layout = resolve_layout(
        named,
        files,
        "query_heads" if "query_heads" in kinds else "kv_groups",
        "whole" if "experts" in kinds else "inside",
    )
    _check_units(plan, layout, files)
    return files, layout


def _check_units(plan: Plan, layout: Layout, files: Checkpoint) -> None:
    """Raise if the plan's units are not those of the model."""
    # ladders aside, n:m units are the unstructured ones, whatever the size of their groups
    pattern = "structured" if plan.space.pattern == "structured" else "unstructured"
    expected = build_space(layout, files, pattern, target=0.5)
    there = {(u.name, u.kind, u.total, u.params[0], u.macs[0]) for u in expected.units}
    named = {(u.name, u.kind, u.total, u.params[0], u.macs[0]) for u in plan.space.units}
    if there != named or not expected.fixed.items() <= plan.space.fixed.items():
        odd = min(there ^ named)[0] if there != named else "what is outside units"
        raise UserError(
            f"plan: it and the model {files.folder} disagree on {odd}. Name the family file that it was made "
            "with, with --family FILE, or make the plan again with a search"
        )


def _shape(files: Checkpoint) -> str:
    """Return what a pruned model shares with the dense one, in words."""
    architecture = files.config.get("pruned", {}).get("architecture", files.architecture)
    sizes = (f"{key} {files.config.get(key)}" for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    return f"{architecture} with {', '.join(sizes)}"
