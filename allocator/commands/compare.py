"""The comparison: published rules and plans are executed, reloaded, counted and measured at one budget."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.commands.evaluators import connect, open_evaluator
from allocator.core.budget import fits
from allocator.core.costs import from_units
from allocator.core.errors import UserError, did_you_mean
from allocator.core.files import fingerprint, read_json, write_json
from allocator.core.plan import Plan
from allocator.core.results import COMPARISON_KIND, COMPARISON_SCHEMA, Figures
from allocator.core.signals import Signal, Signals
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.spec import Evaluator, Execution
from allocator.evaluation.zeroth_order import zeroth_order
from allocator.pruning.levels.store import LevelStore
from allocator.pruning.signals import collect
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.directory import check_folder, create_run, reopen_run
from allocator.run.job import Job
from allocator.run.level_store import build_store, find_store, locate_store
from allocator.run.model import describe_texts, with_serving_costs
from allocator.run.prepare import prepare_job
from allocator.run.recorder import Recorder
from allocator.run.reporting import Reporter, Silent
from allocator.searchers.loop import Measurer, search
from allocator.searchers.rules.measured import MEASURED_RULES, RuleTokens, make_rule_searcher
from allocator.searchers.rules.one_shot import RULES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from allocator.run.config.options import RunOptions


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison.

    Attributes:
        folder: The folder of the comparison.
        data: The content of ``compare.json``.
    """

    folder: Path
    data: Mapping[str, Any]

    @property
    def measured(self) -> Mapping[str, Figures]:
        """For each rule or plan: ``params``, ``sparsity``, ``within_budget``, ``kl``, ``nll`` and ``perplexity``."""
        measured: Mapping[str, Figures] = self.data["measured"]
        return measured


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: an allocation of a space."""

    space: SearchSpace
    allocation: Allocation

    @property
    def key(self) -> str:
        """A fingerprint. Two lines with the same space and allocation have the same one."""
        return fingerprint([self.space.to_json(), list(self.allocation)])


def compare(
    model: str | Path | None = None,
    *,
    rules: Sequence[str] = (),
    plans: Sequence[Path | str] = (),
    config: RunConfig | Path | str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **options: Unpack[RunOptions],
) -> Comparison:
    """Compare published allocation rules and given plans at one budget, on held-out text.

    The local pruner and the calibration text of the configuration are used for every rule and every plan. The pruner
    that a plan names is ignored. All measurements are kept in the comparison's folder.

    Args:
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        rules: Names of rules. If empty, no rules if there are plans, else all rules that serve the pattern.
        plans: Files of plans for the same model and pattern.
        config: A configuration or a run file. Options override it. Rules that measure use the searcher's fidelities.
        resume: Continue the comparison of this name, perhaps with more rules or plans.
        reporter: Receives progress.
        options: See :class:`~allocator.run.config.options.RunOptions`.

    Raises:
        UserError: An input is wrong. The message says what to do. Nothing was written.
    """
    settings = build_comparison_config(model, config, options, resume)
    return run_comparison(settings, rules, [Path(plan) for plan in plans], resume, reporter)


def build_comparison_config(
    model: str | Path | None, config: RunConfig | Path | str | None, options: Mapping[str, Any], resume: bool
) -> RunConfig:
    """Return the configuration of a comparison. It is a run's configuration with another default name.

    Raises:
        UserError: The configuration has objectives, or :func:`~allocator.run.config.load.build_config` raised.
    """
    given = build_config(model, config, options)
    if given.objectives:
        raise UserError("objectives: a comparison has one budget. Give a target or constraints in place of objectives")
    name = given.name or f"{given.run_name}-compare"
    return build_config(model, config, {**options, "name": name}, resume)


def choose_rules(pattern: str, names: Sequence[str] = ()) -> list[str]:
    """Return the names of rules that serve a pattern: the given ``names``, or all such rules if none is given.

    Raises:
        UserError: A name is unknown, or its rule does not serve the pattern.
    """
    known = {name: rule.patterns for name, rule in RULES.items()}
    known |= {name: rule.patterns for name, rule in MEASURED_RULES.items()}
    serving = [name for name, patterns in known.items() if pattern in patterns]
    for name in names:
        if name not in known:
            raise UserError(f"rule: unknown rule {name!r}{did_you_mean(name, known)}. Known: {', '.join(known)}")
        if name not in serving:
            raise UserError(f"rule: {name} does not serve {pattern} pruning; these do: {', '.join(serving)}")
    return list(dict.fromkeys(names)) or serving


def run_comparison(
    config: RunConfig,
    rules: Sequence[str] = (),
    plans: Sequence[Path] = (),
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Comparison:
    """Run the comparison that a configuration describes. See :func:`compare`."""
    with Recorder(reporter or Silent()) as recorder:
        return Comparison(config.folder, _compare(config, rules, plans, resume, recorder))


def _compare(
    config: RunConfig, rules: Sequence[str], plans: Sequence[Path], resume: bool, recorder: Recorder
) -> dict[str, Any]:
    folder = config.folder
    config = config.model_copy(update={"search": replace(config.search, rounds=1)})  # a comparison has one level store
    check_folder(folder, resume)
    if resume and (folder / "front.json").exists():
        raise UserError(f"{folder}: holds a search, not a comparison. Choose another --name")
    recorder.start_phase("checking")
    chosen = choose_rules(config.pattern, rules) if rules or not plans else []
    job = prepare_job(config, recorder.notify)
    chosen = _drop_likelihood_rules(job, chosen, bool(rules), recorder)
    entries = {"dense": Entry(job.space, job.space.dense), **_read_plans(job, plans)}
    one_shot = list(dict.fromkeys(["uniform", *(name for name in chosen if name in RULES)]))
    measured = [name for name in chosen if name in MEASURED_RULES]
    with ExitStack() as opened:
        if resume:
            _, journal = reopen_run(job, recorder)
            opened.enter_context(journal)
        stored = bool(measured) or not job.recompute
        build = stored and find_store(job) is None
        opened.enter_context(connect(job.config, recorder))
        if not resume:
            journal = opened.enter_context(create_run(job))
        recorder.start_recording(folder, len(journal))
        for line in describe_texts(job.tokens):
            recorder.notify(line)
        signals = _collect_signals(job, folder, {need for name in one_shot for need in RULES[name].needs}, recorder)
        for name in one_shot:
            entries[name] = Entry(job.space, RULES[name].allocate(job.space, job.budget, job.target, signals))
        spec = job.engine_spec(LevelStore(locate_store(job)) if stored else None)
        with open_evaluator(spec, job.tokens, job.config, recorder) as evaluator:
            recorder.attach(evaluator)
            if build:
                build_store(job, evaluator, recorder)
            measurer = Measurer(evaluator, journal)
            for name in measured:
                entries[name] = Entry(job.space, _run_measured_rule(job, name, measurer, recorder))
            table = _Table(job, folder)
            table.execute({n: e for n, e in entries.items() if e.space == job.space}, evaluator, recorder)
        for name, entry in entries.items():
            if entry.space != job.space:
                own_spec = replace(spec, space=entry.space, store=None)
                with open_evaluator(own_spec, job.tokens, job.config, recorder) as evaluator:
                    recorder.attach(evaluator)
                    table.execute({name: entry}, evaluator, recorder)
    return table.data


def _drop_likelihood_rules(job: Job, names: list[str], named: bool, recorder: Recorder) -> list[str]:
    """Return the rules that the model can use. Some rules need the likelihood of text, which not every model gives.

    Raises:
        UserError: The model cannot use a rule that the user ``named``.
    """
    odd = [name for name in names if name in RULES and "gradient" in RULES[name].needs]
    if job.checkpoint.kind.generates or not odd:
        return names
    if named:
        raise UserError(f"--rule: {odd[0]} needs the likelihood of text, and {job.checkpoint.architecture} gives none")
    recorder.notify(f"notice: {odd[0]} is left out, because it needs the likelihood of text")
    return [name for name in names if name not in odd]


class _Table:
    """``compare.json``, with one line for each rule or plan. The file is written again after each batch."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job, self._folder, self._path = job, folder, folder / "compare.json"
        self.data: dict[str, Any] = {
            "schema": COMPARISON_SCHEMA,
            "kind": COMPARISON_KIND,
            "model": job.model_id,
            "pattern": job.space.pattern,
            "asked": job.config.asked,
            "budget": {cost: from_units(cost, limit) for cost, limit in job.budget.limits.items()},
            "pruner": job.pruner_id,
            "measured": {},
            "allocations": {},
        }
        if self._path.exists():
            self.data = read_json(self._path, "comparison")

    def execute(self, entries: Mapping[str, Entry], evaluator: Evaluator, reporter: Reporter) -> None:
        """Measure the new lines and write the results after each batch. Equal allocations are measured once."""
        known = {line["key"]: name for name, line in self.data["allocations"].items()}
        new = {entry.key: entry for entry in entries.values() if entry.key not in known}
        reporter.start_phase("executing", len(new))
        figures = {key: self.data["measured"][name] for key, name in known.items()}
        self._keep(entries, figures)
        width = max(1, self._job.config.workers)
        waiting = list(new.values())
        for start in range(0, len(waiting), width):
            figures.update(self._run(waiting[start : start + width], evaluator))
            self._keep(entries, figures)
            reporter.advance(min(start + width, len(waiting)))

    def _run(self, batch: Sequence[Entry], evaluator: Evaluator) -> Iterable[tuple[str, dict[str, float]]]:
        with tempfile.TemporaryDirectory(prefix=".executing-", dir=self._folder, ignore_cleanup_errors=True) as scratch:
            executions = [
                Execution(entry.allocation, self._job.recompute, Path(scratch).absolute() / str(index))
                for index, entry in enumerate(batch)
            ]
            found = evaluator.execute(executions, self._job.config.tokens.test)
        return [(entry.key, figures) for entry, figures in zip(batch, found, strict=True)]

    def _keep(self, entries: Mapping[str, Entry], figures: Mapping[str, Mapping[str, float]]) -> None:
        for name, entry in entries.items():
            if entry.key in figures:
                params, sparsity = figures[entry.key]["params"], round(entry.space.sparsity(entry.allocation), 6)
                within = fits(entry.space, entry.allocation, self._job.budget) or name == "dense"
                own = {**figures[entry.key], "params": params, "sparsity": sparsity, "within_budget": within}
                self.data["measured"][name] = own
                self.data["allocations"][name] = {"key": entry.key, "levels": list(entry.allocation)}
        write_json(self._path, self.data)


def _read_plans(job: Job, plans: Sequence[Path]) -> dict[str, Entry]:
    """Return a line for each plan. A plan is named after its file, or after its folder if the file is ``plan.json``."""
    entries: dict[str, Entry] = {}
    for path in plans:
        plan = Plan.load(path)
        if plan.model["fingerprint"] != job.checkpoint.fingerprint:
            raise UserError(
                f"{path}: this plan is for another model, {plan.model['id']}. Compare plans of {job.checkpoint.folder}"
            )
        if plan.space.pattern != job.space.pattern:
            raise UserError(
                f"{path}: the pattern of the plan is {plan.space.pattern}. The pattern of this comparison is "
                f"{job.space.pattern}. Compare with --pattern {plan.space.pattern}"
            )
        own, ours = ([(u.name, u.kind, u.params[0], u.group) for u in s.units] for s in (plan.space, job.space))
        served = with_serving_costs(job.config, job.checkpoint, job.layout, plan.space) if own == ours else plan.space
        if own != ours or any(served.fixed[cost] != job.space.fixed[cost] for cost in ("params", "macs")):
            raise UserError(
                f"{path}: the plan's units differ from the units of this comparison. Use the plan's settings of "
                "ladder.attention, ladder.patterns and pruner.bias"
            )
        if served != job.space and not job.recompute:
            raise UserError(
                f"{path}: the plan's ladders differ from the ladders of this comparison. {job.pruner.name} takes "
                "weights from a level store, which has only the comparison's ladders. Use the plan's target or "
                "ladder.sparsities, or --set pruner.execution=recompute"
            )
        name = path.absolute().parent.name if path.name == "plan.json" else path.stem
        name = f"plan {name}"
        if name in entries:
            raise UserError(f"{path}: two plans are called {name!r}. Copy one of them to a file with another name")
        entries[name] = Entry(served, plan.allocation)
    return entries


def _collect_signals(job: Job, folder: Path, wanted: set[Signal], reporter: Reporter) -> Signals:
    """Return the wanted signals. Signals that the folder lacks are collected and written to it."""
    path = folder / "signals.npz"
    signals = Signals.load(path) if path.exists() else Signals({})
    spec, blocks = job.engine_spec(None), len(job.layout.blocks)
    if of_text := signals.missing(wanted - {"gradient"}):
        reporter.start_phase("signals", blocks)
        calibration = spec.calibration(job.tokens["calibration"], reporter.advance, reporter.notify)
        signals = signals.merged(collect(calibration, of_text))
        signals.save(path)
    if signals.missing(wanted):
        reporter.start_phase("slopes", blocks)
        signals = signals.merged(zeroth_order(spec, job.tokens["calibration"], reporter.advance))
        signals.save(path)
    return signals


def _run_measured_rule(job: Job, name: str, measurer: Measurer, reporter: Reporter) -> Allocation:
    reporter.start_phase(name)
    tokens = RuleTokens(job.config.search.fidelities[0], job.config.search.fidelities[-1])
    procedure = MEASURED_RULES[name].run(job.space, job.budget, job.target, tokens)
    searcher = make_rule_searcher(procedure, (), tokens)
    batches = itertools.count(1)
    search(searcher, measurer, lambda o: reporter.advance(next(batches), f"{measurer.spent.evaluations} evaluations"))
    return searcher.finalists()[0]
