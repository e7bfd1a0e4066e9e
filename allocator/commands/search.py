"""The search: it takes a model and a budget, and makes a plan, a smaller checkpoint and measured figures."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.commands.evaluators import connect, open_evaluator
from allocator.core.errors import UserError
from allocator.core.files import write_json
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome
from allocator.core.results import Figures
from allocator.evaluation.spec import EngineSpec, Evaluator
from allocator.pruning.levels.store import LevelStore
from allocator.pruning.pruners.protocol import LocalPruner
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.directory import check_folder, create_run, reopen_run, start_next_round
from allocator.run.execution import execute_decision, measure_latencies
from allocator.run.front_file import FrontWriter
from allocator.run.job import TRAINING_FOLDER, Job
from allocator.run.level_store import build_store, find_store, locate_store, name_round
from allocator.run.model import describe_texts
from allocator.run.prepare import prepare_job
from allocator.run.recorder import Recorder
from allocator.run.reporting import Reporter, Silent
from allocator.run.result import make_run_plan, summarise_run
from allocator.run.rounds import prepare_next_round
from allocator.searchers.problem import MethodSettings
from allocator.searchers.settings import CUSTOM
from allocator.searchers.study import Decision, Study, run_study

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from allocator.run.config.options import RunOptions


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a finished search.

    Attributes:
        folder: The folder of the run.
        plan: The chosen plan.
        summary: The content of ``result.json``.
    """

    folder: Path
    plan: Plan
    summary: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The folder of the pruned checkpoint."""
        return self.folder / "checkpoint"

    @property
    def figures(self) -> Mapping[str, Figures]:
        """Measured figures by name: ``dense``, ``uniform``, ``two_rate``, ``searched`` and others."""
        figures: Mapping[str, Figures] = self.summary["measured"]
        return figures


def search(
    model: str | Path | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    searcher: MethodSettings | None = None,
    pruner: LocalPruner | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **options: Unpack[RunOptions],
) -> SearchResult:
    """Search for a plan, write its pruned checkpoint, and measure the checkpoint.

    Args:
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration or a run file. Options override it.
        searcher: Settings of your own searcher, in place of ``method``. Ray workers do not need its code.
        pruner: Your own local pruner, in place of ``pruner.name``. Ray workers must be able to import its class.
        resume: Continue the run of this name. Earlier measurements are not repeated.
        reporter: Receives progress.
        options: See :class:`~allocator.run.config.options.RunOptions`.

    Raises:
        UserError: An input is wrong. The message says what to do. Nothing was written.
    """
    given: dict[str, Any] = {**options}
    if searcher is not None:
        if options.get("method") is not None:
            raise UserError("method: method and searcher exclude each other. Leave one of them out")
        given["method"] = CUSTOM
    settings = build_config(model, config, given, resume)
    if searcher is not None:
        settings = settings.model_copy(update={"search": settings.search.with_custom(searcher)})
    return run_search(settings, resume, reporter, pruner)


def run_search(
    config: RunConfig, resume: bool = False, reporter: Reporter | None = None, pruner: LocalPruner | None = None
) -> SearchResult:
    """Run the search that a configuration describes. See :func:`search`."""
    with Recorder(reporter or Silent()) as recorder:
        return _Run(config, resume, recorder, pruner).run()


class _Run:
    """A search from its first check to its report."""

    def __init__(self, config: RunConfig, resume: bool, recorder: Recorder, pruner: LocalPruner | None) -> None:
        self._config, self._resume, self._recorder, self._pruner = config, resume, recorder, pruner
        self._wall_s: dict[str, float] = {}

    def run(self) -> SearchResult:
        recorder, folder = self._recorder, self._config.folder
        check_folder(folder, self._resume)
        recorder.start_phase("checking")
        job = prepare_job(self._config, recorder.notify, self._pruner)
        if job.config.device == "cuda" and job.config.search.training:
            recorder.notify("notice: GPUs sum gradients in no fixed order, so rounding may change the plan")
        start_s = time.perf_counter()
        with ExitStack() as journals, ExitStack() as workers:
            if self._resume:
                job, journal = reopen_run(job, recorder)
                journals.enter_context(journal)
            store = find_store(job)
            workers.enter_context(connect(job.config, recorder))
            if not self._resume:
                journal = journals.enter_context(create_run(job))
            recorder.start_recording(folder, len(journal))
            for line in describe_texts(job.tokens):
                recorder.notify(line)
            evaluator = workers.enter_context(open_evaluator(_engine_spec(job), job.tokens, job.config, recorder))
            recorder.attach(evaluator)
            decision = self._search_round(job, evaluator, journal, store)
            while not job.config.search.is_last_round(job.round_number):
                shutil.rmtree(folder / TRAINING_FOLDER, ignore_errors=True)
                job, previous = prepare_next_round(job, decision), journal
                journal = journals.enter_context(start_next_round(job))
                previous.close()
                evaluator.renew(_engine_spec(job))
                decision = self._search_round(job, evaluator, journal, find_store(job))
            with self._timed("execute"):
                measured = execute_decision(job, decision, evaluator, recorder)
            shutil.rmtree(folder / TRAINING_FOLDER, ignore_errors=True)
            plan = make_run_plan(job, decision, measured)
            plan.save(folder / "plan.json")
            workers.close()  # nothing else runs while latency is measured
            recorder.attach(None)
            with self._timed("latency"):
                latency = measure_latencies(job, decision, recorder)
            self._wall_s["total"] = time.perf_counter() - start_s
            summary = {**summarise_run(job, journal, decision, plan, self._wall_s), **latency}
            write_json(folder / "result.json", summary)
            from allocator.report.page import write_report

            write_report(folder)
        return SearchResult(folder, plan, summary)

    def _search_round(self, job: Job, evaluator: Evaluator, journal: Journal, store: LevelStore | None) -> Decision:
        """Run one round of the search. Build its level store first if there is none."""
        with self._timed("store"):
            if store is None:
                build_store(job, evaluator, self._recorder)
            else:
                self._recorder.notify(f"level store {locate_store(job)} fits and is reused")
        with self._timed("search"):
            return _decide(job, evaluator, journal, self._recorder)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self._wall_s[name] = self._wall_s.get(name, 0.0) + time.perf_counter() - start_s


def _engine_spec(job: Job) -> EngineSpec:
    return job.engine_spec(LevelStore(locate_store(job)))


def _decide(job: Job, evaluator: Evaluator, journal: Journal, recorder: Recorder) -> Decision:
    settings, front, batches = job.config.search, FrontWriter(job, journal, recorder), itertools.count(1)

    def listen(outcomes: Sequence[Outcome]) -> None:
        figures = front.write_if_due()
        recorder.advance(next(batches), f"{len(journal)} evaluations{figures}")

    def phase(name: str) -> None:
        recorder.start_phase(f"{name}{name_round(job)}", settings.num_batches if name == "search" else None)

    study = Study(
        space=job.space,
        budget=job.budget,
        objectives=job.config.objectives,
        settings=settings,
        seed=job.config.seed,
        selection_tokens=job.config.tokens.selection,
        at_knee=job.config.target is None,
        round=job.round,
    )
    decision = run_study(study, evaluator, journal, listen, phase)
    front.write()
    return decision
