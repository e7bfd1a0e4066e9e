"""Export target for Optuna: a search becomes a study, for Optuna's analyses and for optuna-dashboard."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.core.costs import costs_of, from_units
from allocator.core.front import figure
from allocator.core.journal import Journal
from allocator.core.outcomes import find_front, list_objectives, select_comparable
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome
from allocator.core.space import SearchSpace
from allocator.interop.contract import Source
from allocator.interop.searches import SearchTarget, iterate_rounds, require_run
from allocator.interop.writing import format_command, write_lines

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FILE = "study.log"

_BEGIN = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Optuna(SearchTarget):
    """Writes one study for each round of a search, in Optuna's journal format. Every evaluation is a trial.

    A trial is complete if it was measured on all tokens of the search split and could be a member of the front. Only
    complete trials have values. Failed measurements are failed trials. All other evaluations are pruned trials, because
    their losses cannot be compared with the values. Their figures are kept as attributes. The limits of the budget
    become constraints, so Optuna's best trials keep them.

    A run records durations, but no dates. So the trials are dated one after another, from 1970 on.
    """

    name = "optuna"
    writes = "a study with every evaluation, as Optuna's journal"

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the studies."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logs = _Logs()
        storage = optuna.storages.JournalStorage(logs)  # type: ignore[arg-type]
        lines = []
        for name, journal in iterate_rounds(require_run(source)):
            names = _name_objectives(journal)
            study = optuna.create_study(storage=storage, study_name=name, directions=["minimize"] * len(names))
            _name_metrics(study, names)
            for key in ("model", "pattern", "asked", "method", "seed", "budget"):
                study.set_user_attr(key, {**journal.header.to_json(), "pattern": journal.space.pattern}[key])
            study.add_trials(trials := [*_build_trials(journal, names, source.plan)])
            lines.append(f"study {name!r}: {_count_states(trials)}")
        write_lines(folder / FILE, (json.dumps({**log, "worker_id": "allocator"}) for log in logs.kept))
        dates = "a run keeps no dates: trials follow each other from 1970 on"
        return [*lines, dates, f"next: {format_command('optuna-dashboard', FILE)}"]


TARGET = Optuna()


class _Logs:
    """Optuna's journal in memory. It is written once at the end, and does not name the process that wrote it."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self.kept[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.kept += logs


def _name_metrics(study: Study, names: list[str]) -> None:
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(names)


def _name_objectives(journal: Journal) -> list[str]:
    return list_objectives(journal) if journal.header.objectives else [journal.loss]


def _build_trials(journal: Journal, names: Sequence[str], plan: Plan) -> Iterator[FrozenTrial]:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import TrialState

    space, begin, planned = journal.space, _BEGIN, (plan.space, plan.allocation)
    complete = {outcome.request.key for outcome in select_comparable(journal)}
    members = {outcome.request.key: index for index, outcome in enumerate(find_front(journal))}
    bounds = [] if journal.header.budget is None else [*journal.header.budget.limits.items()]
    distributions: dict[str, BaseDistribution] = {
        unit.name: optuna.distributions.IntDistribution(0, unit.num_levels - 1) for unit in space.units
    }
    for number, batch in enumerate(journal.batches):
        for outcome in batch:
            key, allocation = outcome.request.key, outcome.request.allocation
            state = TrialState.FAIL if outcome.failed else TrialState.PRUNED
            end = begin + timedelta(seconds=outcome.wall_s)
            yield optuna.trial.FrozenTrial(
                number=-1,
                trial_id=-1,
                value=None,
                values=[_scale_figure(space, outcome, name) for name in names] if key in complete else None,
                state=TrialState.COMPLETE if key in complete else state,
                params={unit.name: level for unit, level in zip(space.units, allocation, strict=True)},
                distributions=distributions,
                user_attrs={
                    **_list_attributes(space, outcome, number),
                    **({"front": members[key]} if key in members else {}),
                    **({"plan": True} if key in complete and (space, allocation) == planned else {}),
                },
                system_attrs={"constraints": [space.cost(allocation, cost) - limit for cost, limit in bounds]},
                intermediate_values={},
                datetime_start=begin,
                datetime_complete=end,
            )
            begin = end


def _scale_figure(space: SearchSpace, outcome: Outcome, name: str) -> float:
    value = figure(space, outcome, name)
    return from_units(name, int(value)) if name in space.fixed else value


def _list_attributes(space: SearchSpace, outcome: Outcome, batch: int) -> dict[str, Any]:
    request = outcome.request
    return {
        "split": request.split,
        "tokens": request.tokens,
        "seconds": outcome.wall_s,
        "batch": batch,
        **({"training": request.training} if request.training else {}),
        **({"blocks": request.blocks} if request.blocks else {}),
        **outcome.measured,
        **costs_of(space, request.allocation),
        **({"failed": outcome.failed} if outcome.failed else {}),
    }


def _count_states(trials: Sequence[FrozenTrial]) -> str:
    states = [trial.state.name for trial in trials]
    return (
        f"{len(trials)} evaluations: {states.count('COMPLETE')} complete, on all tokens; {states.count('PRUNED')} "
        f"pruned, on fewer tokens, so not comparable; {states.count('FAIL')} failed"
    )
