"""Rules of the field, and plans, side by side: each saved, reloaded, counted and measured at one budget."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allocator.commands.search import build_store, cluster, evaluators
from allocator.core.budget import fits
from allocator.core.costs import from_units
from allocator.core.errors import UserError, did_you_mean
from allocator.core.files import fingerprint, read_json, write_json
from allocator.core.plan import Plan
from allocator.core.signals import Signal, Signals
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.engine import Execution
from allocator.evaluation.zeroth_order import zeroth_order
from allocator.pruning.levels.store import LevelStore
from allocator.pruning.signals import collect
from allocator.run.config import RunConfig, load_config
from allocator.run.directory import begun, check_folder, find_store, resumed, store_place
from allocator.run.job import Job, prepare, serving
from allocator.run.recorder import Recorder
from allocator.run.reporting import Reporter, Silent
from allocator.searchers.loop import Measurer, search
from allocator.searchers.rules.measured import MEASURED_RULES, RuleTokens, make_rule_searcher
from allocator.searchers.rules.one_shot import RULES


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: an allocation of a space."""

    space: SearchSpace
    allocation: Allocation

    @property
    def key(self) -> str:
        """What makes two lines the same model."""
        return fingerprint([self.space.to_json(), list(self.allocation)])


def comparison_config(
    file: Path | None, flags: Mapping[str, Any], assignments: Sequence[str], resume: bool
) -> RunConfig:
    """Return the configuration of a comparison: a run's, with a name of its own unless one is given.

    Raises:
        UserError: As :func:`~allocator.run.config.load_config`.
    """
    given = load_config(file, flags, assignments)
    if given.objectives:
        raise UserError("objectives: a comparison is at one budget. Leave them out, and give a target or constraints")
    return load_config(file, {**flags, "name": given.name or f"{given.run_name}-compare"}, assignments, resume)


def rules_for(pattern: str, names: Sequence[str] = ()) -> list[str]:
    """Return the names of the rules that serve a pattern: all, or those named.

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
) -> dict[str, Any]:
    """Allocate by rules, execute what they and the plans say, and measure it on held-out text.

    All are executed by one local pruner on one calibration text, those of the configuration; a plan's own are not
    looked at. Whatever was measured stays in the run's folder, and a resumed comparison measures only what is new.

    Args:
        config: The model, the budget and how to prune; its searcher's tokens are those on which rules measure.
        rules: Names of rules; none for all that serve the pattern, or for none if there are plans.
        plans: Files of plans for the same model and pattern.
        resume: Continue the comparison of this name, perhaps with more rules or plans.
        reporter: Hears about progress.

    Returns:
        The content of ``compare.json``.

    Raises:
        UserError: An input is wrong. Nothing was written.
    """
    with Recorder(reporter or Silent()) as recorder:
        return _run(config, rules, plans, resume, recorder)


def _run(
    config: RunConfig, rules: Sequence[str], plans: Sequence[Path], resume: bool, reporter: Recorder
) -> dict[str, Any]:
    folder = config.folder
    config = config.model_copy(update={"search": replace(config.search, rounds=1)})  # a comparison has one store
    check_folder(folder, resume)
    if resume and (folder / "front.json").exists():
        raise UserError(f"{folder}: holds a search, not a comparison. Choose another --name")
    reporter.phase("checking")
    chosen = rules_for(config.pattern, rules) if rules or not plans else []
    job = prepare(config, reporter.say)
    config = job.config
    if not job.checkpoint.kind.generates and (
        odd := [n for n in chosen if n in RULES and "gradient" in RULES[n].needs]
    ):
        if rules:
            raise UserError(
                f"--rule: {odd[0]} follows the likelihood of text, and {job.checkpoint.architecture} has none"
            )
        reporter.say(f"notice: {odd[0]} is left out, for it follows the likelihood of text")
        chosen = [name for name in chosen if name not in odd]
    entries = {"dense": Entry(job.space, job.space.dense), **_plan_entries(job, plans)}
    closed = list(dict.fromkeys(["uniform", *(name for name in chosen if name in RULES)]))
    measured = [name for name in chosen if name in MEASURED_RULES]
    with ExitStack() as opened:
        if resume:
            _, journal = resumed(job, reporter)
            opened.enter_context(journal)
        stored = bool(measured) or not job.recompute
        build = stored and find_store(job) is None
        opened.enter_context(cluster(config, reporter))
        if not resume:
            journal = opened.enter_context(begun(job))
        reporter.begin(folder, len(journal))
        signals = _signals(job, folder, {need for name in closed for need in RULES[name].needs}, reporter)
        for name in closed:
            allocation = RULES[name].allocate(job.space, job.budget, job.target, signals)
            entries[name] = Entry(job.space, allocation)
        spec = job.engine_spec(LevelStore(store_place(job)) if stored else None)
        with evaluators(spec, job.tokens, config, reporter) as evaluator:
            reporter.staff(evaluator)
            if build:
                build_store(job, evaluator, reporter)
            measurer = Measurer(evaluator, journal)
            for name in measured:
                entries[name] = Entry(job.space, _measured_rule(job, name, measurer, reporter))
            table = _Table(job, folder)
            table.execute({n: e for n, e in entries.items() if e.space == job.space}, evaluator, reporter)
        for name, entry in entries.items():
            if entry.space != job.space:
                own = replace(spec, space=entry.space, store=None)
                with evaluators(own, job.tokens, config, reporter) as evaluator:
                    reporter.staff(evaluator)
                    table.execute({name: entry}, evaluator, reporter)
    return table.data


class _Table:
    """``compare.json`` as it grows, one line for each rule or plan."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job, self._folder, self._path = job, folder, folder / "compare.json"
        self.data: dict[str, Any] = {
            "schema": 3,
            "kind": "allocator.commands.compare",
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

    def execute(self, entries: Mapping[str, Entry], evaluator: Any, reporter: Reporter) -> None:
        """Measure the lines that are new, each distinct allocation once, and keep every one as it comes."""
        known = {line["key"]: name for name, line in self.data["allocations"].items()}
        new = {entry.key: entry for entry in entries.values() if entry.key not in known}
        reporter.phase("executing", len(new))
        figures = {key: self.data["measured"][name] for key, name in known.items()}
        self._keep(entries, figures)
        width = max(1, self._job.config.workers)
        waiting = list(new.values())
        for start in range(0, len(waiting), width):
            figures.update(self._run(waiting[start : start + width], evaluator))
            self._keep(entries, figures)
            reporter.step(min(start + width, len(waiting)))

    def _run(self, batch: Sequence[Entry], evaluator: Any) -> Iterable[tuple[str, dict[str, float]]]:
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


def _plan_entries(job: Job, plans: Sequence[Path]) -> dict[str, Entry]:
    """Return a line for each plan, named after its folder, or its file if that has a name of its own."""
    entries: dict[str, Entry] = {}
    for path in plans:
        plan = Plan.load(path)
        if plan.model["fingerprint"] != job.checkpoint.fingerprint:
            raise UserError(
                f"{path}: a plan for {plan.model['id']}, another model. Compare plans of {job.checkpoint.folder}"
            )
        if plan.space.pattern != job.space.pattern:
            raise UserError(
                f"{path}: the pattern of the plan is {plan.space.pattern}, and this comparison's is "
                f"{job.space.pattern}. Compare with --pattern {plan.space.pattern}"
            )
        own, ours = ([(u.name, u.kind, u.params[0], u.group) for u in s.units] for s in (plan.space, job.space))
        served = serving(job.config, job.checkpoint, job.layout, plan.space) if own == ours else plan.space
        if own != ours or any(served.fixed[cost] != job.space.fixed[cost] for cost in ("params", "macs")):
            raise UserError(
                f"{path}: its units are others than this comparison's. Use the plan's settings of ladder.attention, "
                "ladder.patterns and pruner.bias"
            )
        if served != job.space and not job.recompute:
            raise UserError(
                f"{path}: its ladders are others than this comparison's, and {job.pruner.name} takes weights from a "
                "store of one ladder. Use the plan's target or ladder.sparsities, or --set pruner.execution=recompute"
            )
        name = path.absolute().parent.name if path.name == "plan.json" else path.stem
        name = f"plan {name}"
        if name in entries:
            raise UserError(f"{path}: two plans are called {name!r}. Copy one to a file with a name of its own")
        entries[name] = Entry(served, plan.allocation)
    return entries


def _signals(job: Job, folder: Path, wanted: set[Signal], reporter: Reporter) -> Signals:
    """Return signals, from the run's folder or collected now and kept there."""
    path = folder / "signals.npz"
    signals = Signals.load(path) if path.exists() else Signals({})
    spec, blocks = job.engine_spec(None), len(job.layout.blocks)
    if of_text := signals.missing(wanted - {"gradient"}):
        reporter.phase("signals", blocks)
        calibration = spec.calibration(job.tokens["calibration"], reporter.step, reporter.say)
        signals = signals.merged(collect(calibration, of_text))
        signals.save(path)
    if signals.missing(wanted):
        reporter.phase("slopes", blocks)
        signals = signals.merged(zeroth_order(spec, job.tokens["calibration"], reporter.step))
        signals.save(path)
    return signals


def _measured_rule(job: Job, name: str, measurer: Measurer, reporter: Reporter) -> Allocation:
    reporter.phase(name)
    tokens = RuleTokens(job.config.search.fidelities[0], job.config.search.fidelities[-1])
    procedure = MEASURED_RULES[name].run(job.space, job.budget, job.target, tokens)
    searcher = make_rule_searcher(procedure, (), tokens)
    batches = itertools.count(1)
    search(searcher, measurer, lambda o: reporter.step(next(batches), f"{measurer.spent.evaluations} evaluations"))
    return searcher.finalists()[0]
