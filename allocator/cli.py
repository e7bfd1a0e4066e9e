"""The command line: each command parses its flags, calls the verb of its name, and prints what comes back."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allocator.core.errors import UserError
from allocator.run.config.flags import take_options
from allocator.run.config.options import RunOptions
from allocator.run.stopping import explain_stop

if TYPE_CHECKING:
    from allocator.commands.submit import SubmittedJob

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find how much each layer of a transformer should lose, and prune it so.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Model = Annotated[str | None, typer.Option(help="Hugging Face folder or hub id. [default: the packaged model]")]
ModelArgument = Annotated[str | None, typer.Argument(help="Folder or hub id. [default: the packaged model]")]
RunFile = Annotated[Path | None, typer.Argument(help="Run file in YAML.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
_COMPARE = tuple(name for name in RunOptions.__annotations__ if name not in ("objectives", "method", "budget", "seed"))


@app.command()
@take_options("text", "pattern", "target", "constraints", "family", "settings")
def inspect(
    model: ModelArgument = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show which unit covers each matrix.")] = False,
    suggest: Annotated[bool, typer.Option("--suggest", help="Draft a family file for the model.")] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show a model's units, ladders and exact costs, from its headers alone, and what the splits hold of a text."""
    from allocator.commands import inspect as verbs

    if suggest:
        print(verbs.suggest_family(model), end="")
        return
    if explain:
        from dataclasses import asdict

        from allocator.report.tables.model import coverage_table

        covered = verbs.explain(model, **options)
        rows = [(each.module, each.shape, each.count, each.by) for each in covered]
        _answer(json_, [asdict(each) for each in covered], lambda _: [coverage_table(rows)])
        return
    space, summary = verbs.inspect(model, **options)
    _answer(json_, summary, lambda answers: answers.answer_inspection(space, summary))


@app.command()
@take_options("family", "settings")
def latency(
    out: Annotated[Path, typer.Option(help="The table's file.")],
    model: Model = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each figure.")] = 20,
    json_: Json = False,
    **options: Any,
) -> None:
    """Measure a table of latencies on this device: every sub-block at every shape, for one workload."""
    from allocator.commands.latency import measure_latency
    from allocator.run.reporting import Live

    with Live() as live:
        table = measure_latency(out, model, repeats=repeats, reporter=live, **options)
    _answer(json_, table.model_dump(mode="json", by_alias=True), lambda answers: answers.answer_latency(table, out))


@app.command()
@take_options(*RunOptions.__annotations__)
def search(
    file: RunFile = None,
    model: Model = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this name.")] = False,
    resume_or_begin: Annotated[
        bool, typer.Option("--resume-or-begin", help="Continue the run of this name; if there is none, begin it.")
    ] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Run the whole line: level store, search, plan, pruned checkpoint, measured figures."""
    from allocator.commands.search import run_search
    from allocator.run.config.load import build_config
    from allocator.run.reporting import Live

    config = build_config(model, file, options, resume)
    resume = resume or (resume_or_begin and config.folder.exists())
    # Ray tells of workers' deaths on standard output, which is for the answer alone
    with explain_stop(config, "search"), redirect_stdout(sys.stderr), Live() as live:
        result = run_search(config, resume, live)
    data = {**result.summary, "folder": str(result.folder), "checkpoint": str(result.checkpoint)}
    _answer(json_, data, lambda answers: answers.answer_search(result.summary, result.folder))


@app.command()
@take_options("name", "runs_dir", "settings")
def submit(
    file: Annotated[Path, typer.Argument(help="Run file in YAML.")],
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's dashboard. [default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]"),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log, and wait for its end.")] = False,
    installed: Annotated[bool, typer.Option("--installed", help="The cluster has this package; send none.")] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Search as a job of a Ray cluster; a run that exists is resumed. Files named by relative paths are sent."""
    from allocator.commands.submit import submit

    log, stop = sys.stderr if json_ else sys.stdout, ""

    def show(job: SubmittedJob) -> None:
        nonlocal stop
        stop = f"ray job stop --address {job.address} {job.job}"
        if not json_:
            _answer(False, None, lambda answers: answers.answer_job(job.job, job.run, job.address, job.size_bytes))

    lines = (lambda text: print(text, end="", file=log, flush=True)) if follow else None
    try:
        job = submit(file, address=address, installed=installed, follow=lines, started=show, **options)
    except KeyboardInterrupt:
        if stop:
            print(f"\nthe job goes on; stop it with:\n  {stop}", file=sys.stderr)
        raise typer.Exit(130) from None
    if json_:
        print(
            json.dumps({"job": job.job, "run": str(job.run), **({"ended": job.status} if job.status else {})}, indent=1)
        )
    if job.status not in (None, "SUCCEEDED"):
        print(f"error: {job.job} has {job.status.lower()}. Submit it again to continue", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@take_options(*_COMPARE)
def compare(
    file: RunFile = None,
    rule: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A rule; repeat. [default: all that serve the pattern]")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="plan.json of this model; repeat.")] = None,
    model: Model = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison of this name.")] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Put the field's allocation rules, and plans, side by side at one budget, on held-out text."""
    from allocator.commands.compare import build_comparison_config, run_comparison
    from allocator.run.reporting import Live

    config = build_comparison_config(model, file, options, resume)
    asked = [*(f" --rule {name}" for name in rule or ()), *(f" --plan {path}" for path in plan or ())]
    with explain_stop(config, "compare", "".join(asked)), redirect_stdout(sys.stderr), Live() as live:
        found = run_comparison(config, rule or (), plan or (), resume, live)
    data = {**found.data, "folder": str(found.folder)}
    _answer(json_, data, lambda answers: answers.answer_comparison(found.data, found.folder))


@app.command()
def status(run: Run, json_: Json = False) -> None:
    """Show how a run gets on, from any machine that sees its folder."""
    from allocator.run.status import read_status

    found = read_status(run)
    _answer(json_, found, lambda answers: answers.answer_status(found))


@app.command()
def front(
    run: Run,
    csv: Annotated[bool, typer.Option("--csv", help="Print every member, one per line, with every figure.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the front into this SVG file.")] = None,
    json_: Json = False,
) -> None:
    """Show the Pareto front of a run, finished or not."""
    from allocator.core.outcomes import read_front

    data = read_front(run / "front.json")
    if plot is not None:
        from allocator.core.files import check_file, write_atomic
        from allocator.report.figures import front_figure, to_svg

        check_file(plot, "--plot")
        write_atomic(plot, to_svg(front_figure(data), "front"))
    if csv and not json_:
        from allocator.report.tables.front import format_front_csv

        print(format_front_csv(data), end="")
        return
    _answer(json_, data, lambda answers: answers.answer_front(data, run))


@app.command()
def plan(
    run: Run,
    target: Annotated[float | None, typer.Option(help="Of what removes at least this share, the least loss.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="BOUND", help="Of what keeps this, the least loss: 'latency_ms <= 12'.")
    ] = None,
    best: Annotated[str | None, typer.Option(help="The least of this figure instead, such as kv_bytes.")] = None,
    knee: Annotated[bool, typer.Option("--knee", help="The knee of the front.")] = False,
    index: Annotated[int | None, typer.Option(help="The member of the front of this number.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    json_: Json = False,
) -> None:
    """Show the plan of a run, or choose another point of what it measured."""
    from allocator.commands.open_run import Run as OpenedRun
    from allocator.core.files import check_file

    chosen = OpenedRun(run).plan(target, where=where or (), best=best, knee=knee, index=index)
    if out is not None:
        check_file(out, "--out")
        chosen.save(out)
    _answer(json_, chosen.to_json(), lambda answers: answers.answer_plan(chosen, out))


@app.command()
@take_options("family")
def prune(
    plan: Annotated[Path, typer.Argument(help="plan.json")],
    out: Annotated[Path, typer.Option(help="Folder of the pruned checkpoint; must not exist.")],
    model: Model = None,
    execution: Annotated[
        str | None, typer.Option(help="recompute: along the plan's path. assemble: from a store. [default: the plan's]")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Level store of the run. [default: beside the plan]")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text that the plan was made with; repeat, in order, for domains.")
    ] = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Execute a plan: write a pruned checkpoint that loads without this package."""
    from allocator.commands.prune import find_store_of, prune
    from allocator.core.plan import Plan
    from allocator.run.reporting import Live

    loaded = Plan.load(plan)
    store = store or find_store_of(loaded, plan, execution)
    with Live() as live:
        counted = prune(
            loaded, out, model=model, text=text or None, execution=execution, store=store, reporter=live, **options
        )
    line = f"{out}: {counted:,} parameters, as planned\nnext  allocator evaluate {out}"
    _answer(json_, {"checkpoint": str(out), "params": counted}, lambda _: [line])


@app.command()
@take_options("family")
def export(
    source: Annotated[Path | None, typer.Argument(help="plan.json, or the folder of a run.")] = None,
    to: Annotated[str | None, typer.Option(help="What for; --list tells.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List what plans can be handed to.")] = False,
    model: Model = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The executed plan, where weights are asked for. [default: beside the plan]")
    ] = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Hand a plan to another tool, with a command that compares what it made with the plan."""
    from allocator.commands.export import export
    from allocator.interop.targets.registry import TARGETS

    if list_:
        from allocator.report.tables.plan import targets_table

        listed = {target.name: {"writes": target.writes, "patterns": [*target.patterns]} for target in TARGETS.values()}
        rows = [(target.name, target.writes, target.patterns) for target in TARGETS.values()]
        _answer(json_, listed, lambda _: [targets_table(rows)])
        return
    if source is None or to is None or out is None:
        raise UserError("export: name a plan, --to TARGET and --out FOLDER; 'allocator export --list' has the targets")
    lines = export(source, to, out, model=model, checkpoint=checkpoint, **options)
    data = {"folder": str(out), "target": to, "notes": lines}
    _answer(json_, data, lambda _: ["\n".join([f"{out}: for {to}", *lines])])


@app.command("import")
@take_options("pattern", "text", "family", "settings")
def import_(
    file: Annotated[Path, typer.Argument(help="Shares by module or by block, or levels.")],
    out: Annotated[Path, typer.Option(help="The plan's file.")],
    model: Model = None,
    level_zero: Annotated[float | None, typer.Option(help="Sparsity of level 0. [default: metadata.pth's]")] = None,
    level_step: Annotated[int | None, typer.Option(help="Weights of a level. [default: metadata.pth's]")] = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Make a plan of an allocation that another tool chose: ratios, OWL's list, or levels of EvoPress."""
    from allocator.commands.import_plan import import_plan
    from allocator.core.files import check_file

    check_file(out, "--out")
    made, lines = import_plan(file, model=model, level_zero=level_zero, level_step=level_step, **options)
    made.save(out)
    text = "\n".join([f"plan  {out}", *lines, f"next  allocator prune {out} --out FOLDER"])
    _answer(json_, {"plan": str(out), "notes": lines}, lambda _: [text])


@app.command()
@take_options("text", "family")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    model: Model = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of the test split.")] = 16384,
    json_: Json = False,
    **options: Any,
) -> None:
    """Measure a checkpoint on held-out examples: perplexity or accuracy, and the distance from the dense model."""
    from allocator.commands.evaluate import evaluate

    figures = evaluate(checkpoint, model=model, tokens=tokens, length=length, **options)
    from allocator.report.tables.result import format_figures

    _answer(json_, figures, lambda _: [format_figures(figures)])


@app.command()
def report(run: Run, json_: Json = False) -> None:
    """Write the report of a run, finished or not."""
    from allocator.commands.report import write_report

    path = write_report(run)
    _answer(json_, {"report": str(path)}, lambda _: [f"report  {path}"])


def _answer(json_: bool, data: Any, render: Callable[[Any], Sequence[Any]]) -> None:
    """Print data as JSON, or the tables and lines that ``render`` makes with :mod:`allocator.report.answers`."""
    if json_:
        print(json.dumps(data, indent=1))
        return
    from rich.console import Console

    from allocator.report import answers

    for part in render(answers):
        Console(highlight=False, soft_wrap=isinstance(part, str)).print(part)


def main() -> None:
    """Run the command line; bad input is one message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        remedy = "Free some space: a search goes on with --resume, and nothing that was measured is lost"
        print(f"error: {error.strerror}. {remedy}", file=sys.stderr)
        sys.exit(2)
