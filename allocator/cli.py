"""The command line: one verb per step of the way from a model to a smaller one."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allocator.core.errors import UserError

if TYPE_CHECKING:
    from allocator.run.config.run import RunConfig

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
Text = Annotated[Path | None, typer.Option(help=".txt or .jsonl file or folder. [default: Python's library]")]
Pattern = Annotated[str | None, typer.Option(help="structured, unstructured or n:m. [default: structured]")]
Target = Annotated[float | None, typer.Option(help="Share of the units' parameters to remove. [default: 0.5]")]
Constraints = Annotated[
    list[str] | None,
    typer.Option("--constraint", metavar="BOUND", help="Such as 'latency_ms <= 12' or 'kv_bytes <= 0.5x'."),
]
Objectives = Annotated[
    list[str] | None,
    typer.Option(
        "--objective", metavar="NAME", help="Shall be small beside the loss: a cost, nll, or kl.DOMAIN. Finds a front."
    ),
]
Workers = Annotated[int | None, typer.Option(help="Ray workers; 0 for none. [default: one per core, at most 4]")]
RunsDir = Annotated[Path | None, typer.Option(help="Folder of runs. [default: runs]")]
Address = Annotated[str | None, typer.Option(help="Running Ray cluster. [default: a local one]")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key of a run file.")]
Family = Annotated[Path | None, typer.Option(help="Family file, if the search named one.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id. [default: the packaged model]")] = None,
    pattern: Pattern = None,
    target: Target = None,
    constraint: Constraints = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show which unit covers each matrix, and which none.")
    ] = False,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Draft a family file for a model that none serves.")
    ] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Show a model's units, ladders and exact costs, from its headers alone."""
    from dataclasses import asdict

    from allocator.commands import api
    from allocator.run.config.load import load_config

    flags = {"model": model, "pattern": pattern, "target": target, "constraints": constraint or None}
    config = load_config(None, flags, set_ or ())
    if suggest:
        print(api.suggest(config), end="")
        return
    if explain:
        found = api.explain(config)
        if json_:
            _emit([asdict(each) for each in found])
            return
        from allocator.report.tables.model import coverage_table

        _print(coverage_table([(each.module, each.shape, each.count, each.by) for each in found]))
        return
    space, summary = api.inspect(config)
    if json_:
        _emit(summary)
        return
    from allocator.report.tables.formats import format_budget
    from allocator.report.tables.model import format_alignment, format_undivided, space_table

    _print(space_table(space))
    if (line := format_undivided(space)) is not None:
        _print(line)
    budget = format_budget(summary["budget"])
    _print(f"{summary['asked']}: {budget}; uniform has {summary['uniform']['params']:,} parameters")
    if "align" in summary:
        _print(format_alignment(summary["align"]))


@app.command()
def latency(
    out: Annotated[Path, typer.Option(help="The table's file.")],
    model: Model = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each figure.")] = 20,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Measure a table of latencies on this device: every sub-block at every shape, for one workload."""
    from allocator.commands import api
    from allocator.run.config.load import load_config
    from allocator.run.reporting import Live

    config = load_config(None, {"model": model}, set_ or ())
    with Live() as live:
        table = api.latency(config, out, repeats, live)
    if json_:
        _emit(table.model_dump(mode="json", by_alias=True))
        return
    from allocator.report.tables.model import latency_table

    _print(latency_table(table))
    _print(f"table  {out}\nnext   allocator search --constraint 'latency_ms <= 0.5x' --set workload.latency={out}")


@app.command()
def search(
    file: Annotated[Path | None, typer.Argument(help="Run file in YAML.")] = None,
    model: Model = None,
    target: Target = None,
    constraint: Constraints = None,
    objective: Objectives = None,
    pattern: Pattern = None,
    workers: Workers = None,
    method: Annotated[str | None, typer.Option(help="How to search. [default: auto]")] = None,
    budget: Annotated[str | None, typer.Option(help="'300 evaluations', '2e6 tokens' or '20 minutes'.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search. [default: 0]")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    runs_dir: RunsDir = None,
    text: Text = None,
    address: Address = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this name.")] = False,
    resume_or_begin: Annotated[
        bool, typer.Option("--resume-or-begin", help="Continue the run of this name; if there is none, begin it.")
    ] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Run the whole line: level store, search, plan, pruned checkpoint, measured figures."""
    from allocator.commands.search import run_search
    from allocator.run.config.load import load_config
    from allocator.run.config.options import search_assignments
    from allocator.run.reporting import Live

    flags: dict[str, Any] = {
        "model": model,
        "target": target,
        "constraints": constraint or None,
        "objectives": objective or None,
        "pattern": pattern,
        "workers": workers,
        "seed": seed,
        "name": name,
        "runs_dir": runs_dir,
        "text": text,
        "address": address,
    }
    config = load_config(file, flags, [*search_assignments(method, budget), *(set_ or ())], resume)
    resume = resume or (resume_or_begin and config.folder.exists())
    # Ray tells of workers' deaths on standard output, which is for the answer alone
    with _stoppable(config, "search"), redirect_stdout(sys.stderr), Live() as live:
        result = run_search(config, resume, live)
    if json_:
        _emit({**result.summary, "folder": str(result.folder), "checkpoint": str(result.checkpoint)})
        return
    from allocator.report.tables.result import prediction_table, result_table

    _print(result_table(result.summary))
    if "latency" in result.summary:
        _print(prediction_table(result.summary))
    spent = result.summary["search"]
    _print(
        f"search      {spent['evaluations']:,} allocations measured; {spent['ended']}\n"
        f"plan        {result.folder / 'plan.json'}\n"
        f"checkpoint  {result.checkpoint}\n"
        f"report      {result.folder / 'report.html'}\n"
        f"next        allocator front {result.folder}"
    )


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="Run file in YAML.")],
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's dashboard. [default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Folder of runs that all nodes share, absolute.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log, and wait for its end.")] = False,
    installed: Annotated[bool, typer.Option("--installed", help="The cluster has this package; send none.")] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Search as a job of a Ray cluster; a run that exists is resumed. Files named by relative paths are sent."""
    import tempfile

    from allocator.run.config.load import read_keys
    from allocator.run.job_package import COMMAND, pack

    parcel = pack(read_keys(file, {"name": name, "runs_dir": runs_dir}, set_ or ()), file, installed=installed)
    from allocator.pool.jobs import JobServer

    server, run = JobServer(address), parcel.config.folder
    server.check_idle(run)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        parcel.write(package)
        job = server.submit(run, COMMAND, package, parcel.variables)
    of_it = f"--address {server.public_address} {job}"
    if not json_:
        _print(
            f"job   {job}, {parcel.size_bytes / 2**20:.1f} MiB sent\nrun   {run}\n"
            f"next  allocator status {run}\n      ray job logs --follow {of_it}\n      ray job stop {of_it}"
        )
    ended = None
    if follow:
        log = sys.stderr if json_ else sys.stdout
        try:
            ended = server.follow(job, lambda lines: print(lines, end="", file=log, flush=True))
        except KeyboardInterrupt:
            print(f"\n{job} goes on; stop it with:\n  ray job stop {of_it}", file=sys.stderr)
            raise typer.Exit(130) from None
    if json_:
        _emit({"job": job, "run": str(run), **({"ended": ended} if ended else {})})
    if ended not in (None, "SUCCEEDED"):
        print(f"error: {job} has {ended.lower()}. Submit it again to continue", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def compare(
    file: Annotated[Path | None, typer.Argument(help="Run file in YAML.")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A rule; repeat. [default: all that serve the pattern]")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="plan.json of this model; repeat.")] = None,
    model: Model = None,
    target: Target = None,
    constraint: Constraints = None,
    pattern: Pattern = None,
    workers: Workers = None,
    name: Annotated[str | None, typer.Option(help="Name of the comparison.")] = None,
    runs_dir: RunsDir = None,
    text: Text = None,
    address: Address = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison of this name.")] = False,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Put the field's allocation rules, and plans, side by side at one budget, on held-out text."""
    from allocator.commands.compare import comparison_config, run_comparison
    from allocator.run.reporting import Live

    flags: dict[str, Any] = {
        "model": model,
        "target": target,
        "constraints": constraint or None,
        "pattern": pattern,
        "workers": workers,
        "name": name,
        "runs_dir": runs_dir,
        "text": text,
        "address": address,
    }
    config = comparison_config(file, flags, set_ or (), resume)
    asked = [*(f" --rule {name}" for name in rule or ()), *(f" --plan {path}" for path in plan or ())]
    with _stoppable(config, "compare", "".join(asked)), redirect_stdout(sys.stderr), Live() as live:
        data = run_comparison(config, rule or (), plan or (), resume, live)
    if json_:
        _emit({**data, "folder": str(config.folder)})
        return
    from allocator.report.tables.compare import comparison_table

    _print(comparison_table(data))
    _print(f"comparison  {config.folder / 'compare.json'}")


@app.command()
def status(run: Run, json_: Json = False) -> None:
    """Show how a run gets on, from any machine that sees its folder."""
    from allocator.run.status import read_status

    found = read_status(run)
    if json_:
        _emit(found)
        return
    from allocator.report.tables.status import format_status

    _print(format_status(found))
    if found["state"] in ("stopped", "failed", "lost"):
        _print("next        resume it with --resume, or submit it again")


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
    if json_ or csv:
        if json_:
            _emit(data)
        else:
            from allocator.report.tables.front import format_front_csv

            print(format_front_csv(data), end="")
        return
    from allocator.report.tables.front import format_hypervolume, front_table

    _print(front_table(data))
    if "hypervolume" in data:
        _print(format_hypervolume(data["hypervolume"]))
    _print(f"next  allocator plan {run} --index NUMBER --out plan.json")


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
    from allocator.commands import api
    from allocator.core.files import check_file

    chosen = api.plan_from_run(run, target, where=where or (), best=best, knee=knee, index=index)
    if out is not None:
        check_file(out, "--out")
        chosen.save(out)
    if json_:
        _emit(chosen.to_json())
        return
    from allocator.report.tables.plan import plan_table

    _print(plan_table(chosen))
    if out is not None:
        _print(f"plan  {out}\nnext  allocator prune {out} --out FOLDER")


@app.command()
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
    family: Family = None,
    json_: Json = False,
) -> None:
    """Execute a plan: write a pruned checkpoint that loads without this package."""
    from allocator.commands import api
    from allocator.core.plan import Plan
    from allocator.model.checkpoint.headers import PACKAGED
    from allocator.run.reporting import Live

    loaded, beside = Plan.load(plan), plan.parent / "levels"
    assembled = (execution or loaded.pruner["execution"]) == "assemble"
    if assembled and store is None and (beside / "manifest.json").exists():
        store = beside
    with Live() as live:
        counted = api.prune(
            loaded,
            out,
            model=model or PACKAGED,
            execution=execution,
            store=store,
            text=text,
            family=family,
            reporter=live,
        )
    if json_:
        _emit({"checkpoint": str(out), "params": counted})
        return
    _print(f"{out}: {counted:,} parameters, as planned\nnext  allocator evaluate {out}")


@app.command()
def export(
    source: Annotated[Path | None, typer.Argument(help="plan.json, or the folder of a run.")] = None,
    to: Annotated[str | None, typer.Option(help="What for; --list tells.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List what plans can be handed to.")] = False,
    model: Model = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The executed plan, where weights are asked for. [default: beside the plan]")
    ] = None,
    family: Family = None,
    json_: Json = False,
) -> None:
    """Hand a plan to another tool, with a command that compares what it made with the plan."""
    from allocator.commands import api
    from allocator.interop.targets.registry import TARGETS
    from allocator.model.checkpoint.headers import PACKAGED

    if list_:
        if json_:
            _emit({t.name: {"writes": t.writes, "patterns": [*t.patterns]} for t in TARGETS.values()})
            return
        from allocator.report.tables.plan import targets_table

        _print(targets_table([(t.name, t.writes, t.patterns) for t in TARGETS.values()]))
        return
    if source is None or to is None or out is None:
        raise UserError("export: name a plan, --to TARGET and --out FOLDER; 'allocator export --list' has the targets")
    lines = api.export(source, to, out, model=model or PACKAGED, checkpoint=checkpoint, family=family)
    if json_:
        _emit({"folder": str(out), "target": to, "notes": lines})
        return
    _print("\n".join([f"{out}: for {to}", *lines]))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Shares by module or by block, or levels.")],
    out: Annotated[Path, typer.Option(help="The plan's file.")],
    model: Model = None,
    pattern: Pattern = None,
    text: Text = None,
    level_zero: Annotated[float | None, typer.Option(help="Sparsity of level 0. [default: metadata.pth's]")] = None,
    level_step: Annotated[int | None, typer.Option(help="Weights of a level. [default: metadata.pth's]")] = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Make a plan of an allocation that another tool chose: ratios, OWL's list, or levels of EvoPress."""
    from allocator.commands import api
    from allocator.core.files import check_file

    check_file(out, "--out")
    made, lines = api.import_plan(
        file,
        model=model,
        pattern=pattern,
        text=text,
        level_zero=level_zero,
        level_step=level_step,
        settings=set_ or (),
    )
    made.save(out)
    if json_:
        _emit({"plan": str(out), "notes": lines})
        return
    _print("\n".join([f"plan  {out}", *lines, f"next  allocator prune {out} --out FOLDER"]))


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    model: Model = None,
    text: Text = None,
    family: Family = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of the test split.")] = 16384,
    json_: Json = False,
) -> None:
    """Measure a checkpoint on held-out examples: perplexity or accuracy, and the distance from the dense model."""
    from allocator.commands import api
    from allocator.model.checkpoint.headers import PACKAGED

    figures = api.evaluate(checkpoint, model=model or PACKAGED, text=text, family=family, tokens=tokens, length=length)
    if json_:
        _emit(figures)
        return
    said = [f"{name} {figures[name]:.3f}" for name in ("perplexity", "accuracy") if name in figures]
    away = (
        "relative distance of states from dense {hidden:.4f}" if "hidden" in figures else "KL from dense {kl:.4f} nats"
    )
    each = " per token" if "perplexity" in figures else ""
    _print(", ".join([f"{figures['params']:,} parameters", *said, away.format(**figures) + each]))


@app.command()
def report(run: Run, json_: Json = False) -> None:
    """Write the report of a run, finished or not."""
    from allocator.report.page import write_report

    path = write_report(run)
    if json_:
        _emit({"report": str(path)})
        return
    _print(f"report  {path}")


@contextmanager
def _stoppable(config: RunConfig, verb: str, asked: str = "") -> Iterator[None]:
    """Say how to go on where the user, or the end of a job, stops the body; ``asked`` are flags of no run file."""
    from allocator.run.directory import in_job

    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does, but from the start
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        where = f" --runs-dir {config.runs_dir}" if config.runs_dir != Path("runs") else ""
        at = " --address ADDRESS" if config.address is not None else ""
        again = f"Continue with:\n  allocator {verb} --resume --name {config.run_name}{where}{at}{asked}"
        if in_job():
            again = "Submit it again to continue"
        begun = (config.folder / "journal.jsonl").exists()
        print(f"\nstopped; {f'nothing measured is lost. {again}' if begun else 'nothing was begun'}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _emit(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False, soft_wrap=isinstance(renderable, str)).print(renderable)


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
