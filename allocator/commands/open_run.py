"""A run on disk: its front, its evaluations, its result, and a plan for any point of what it measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from allocator.core.budget import Budget, budget_for
from allocator.core.costs import Bound, costs_of, format_cost
from allocator.core.errors import UserError, did_you_mean
from allocator.core.files import read_json
from allocator.core.front import figure, pareto_front
from allocator.core.front import knee as find_knee
from allocator.core.journal import Journal
from allocator.core.outcomes import list_objectives, read_front, select_comparable
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome
from allocator.core.provenance import make_plan
from allocator.core.results import Figures
from allocator.core.space import Allocation
from allocator.run.status import read_status
from allocator.searchers.hypervolume import box


class Records(Sequence[dict[str, Any]]):
    """Rows of a table: one flat mapping for each, ready for a data frame."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or the rows of a slice."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def __repr__(self) -> str:
        columns = ", ".join(self._rows[0]) if self._rows else ""
        return f"Records({len(self._rows)} rows: {columns})"

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one column for each key.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError:
            raise UserError("to_pandas: pandas is not installed. Install it with 'pip install pandas'") from None
        return pandas.DataFrame(list(self._rows))


@dataclass(frozen=True)
class Run:
    """A run on disk, finished or not. Open it with :func:`open_run`.

    Attributes:
        folder: Where it lies.
    """

    folder: Path

    @cached_property
    def _journal(self) -> Journal:
        return Journal.read(self.folder / "journal.jsonl")

    @property
    def front(self) -> Records:
        """The members of the front, from the lowest loss to the lowest cost.

        A row has every cost (times in milliseconds), ``sparsity``, the loss and other measurements, ``selection`` (the
        loss on the selection split) where it was measured, and ``allocation``, one level per unit.
        """
        return Records(read_front(self.folder / "front.json")["points"])

    @property
    def evaluations(self) -> Records:
        """Everything that the present round measured, in the order of the journal.

        A row has ``batch``, ``split``, ``tokens``, ``training``, ``probe``, ``blocks``, every cost, ``sparsity``, the
        measurements, ``wall_s``, ``failed`` (the reason, or empty) and ``allocation``.
        """
        space = self._journal.space
        return Records(
            [
                {
                    "batch": batch,
                    "split": outcome.request.split,
                    "tokens": outcome.request.tokens,
                    "training": outcome.request.training,
                    "probe": outcome.request.probe,
                    "blocks": outcome.request.blocks,
                    **costs_of(space, outcome.request.allocation),
                    "sparsity": round(space.sparsity(outcome.request.allocation), 6),
                    **outcome.measured,
                    "wall_s": outcome.wall_s,
                    "failed": outcome.failed,
                    "allocation": list(outcome.request.allocation),
                }
                for batch, outcomes in enumerate(self._journal.batches)
                for outcome in outcomes
            ]
        )

    @property
    def result(self) -> dict[str, Any]:
        """The content of ``result.json``, which a finished run has.

        Raises:
            UserError: The run is not finished, or the file is damaged.
        """
        result: dict[str, Any] = read_json(self.folder / "result.json", "result of a finished run")
        return result

    @property
    def figures(self) -> Mapping[str, Figures]:
        """Measured figures by checkpoint: ``dense``, ``uniform``, ``two_rate``, ``searched`` and others."""
        figures: Mapping[str, Figures] = self.result["measured"]
        return figures

    @property
    def status(self) -> dict[str, Any]:
        """The present state of the run; see :func:`~allocator.run.status.read_status`."""
        return read_status(self.folder)

    @property
    def checkpoint(self) -> Path:
        """The folder of the pruned checkpoint, which a finished run has."""
        return self.folder / "checkpoint"

    def plan(
        self,
        target: float | None = None,
        *,
        where: Sequence[str] | str = (),
        best: str | None = None,
        knee: bool = False,
        index: int | None = None,
    ) -> Plan:
        """Return the plan of a finished run, or a plan for another point of what the run measured.

        Without arguments it is the run's own plan. Otherwise it is the point of lowest loss that keeps all bounds,
        unless ``best``, ``knee`` or ``index`` says otherwise.

        Args:
            target: The least share of the units' parameters to remove, in (0, 1).
            where: Bounds on costs or measurements, such as ``"latency_ms <= 12"``.
            best: The figure to minimise instead of the loss.
            knee: Take the knee of the members of the front that keep the bounds.
            index: Take the member of the front with this number.

        Raises:
            UserError: The run has no such plan, or arguments exclude each other.
        """
        bounds = [where] if isinstance(where, str) else list(where)
        if (index is not None) + knee + (best is not None) > 1 or (
            index is not None and (bounds or target is not None)
        ):
            raise UserError("plan: --index, --knee and --best exclude each other, and --index any bound. Name one")
        if target is None and not bounds and best is None and not knee and index is None:
            return Plan.load(self.folder / "plan.json")
        journal = self._journal
        if index is not None:
            chosen = self._find_member(index)
        else:
            kept = self._keep_bounds(bounds, best, target)
            chosen = self._find_knee(kept) if knee else self._find_least(kept, best or journal.loss)
        allocation = chosen.request.allocation
        measured = {"search_split": dict(chosen.measured)}
        return make_plan(journal.header, allocation, self._budget_of(allocation), measured, target)

    def _find_member(self, index: int) -> Outcome:
        listed = self.front
        if not 0 <= index < len(listed):
            raise UserError(f"{self.folder}: the front has members 0 to {len(listed) - 1}, and {index} was asked for")
        known = {outcome.request.allocation: outcome for outcome in select_comparable(self._journal)}
        if (member := tuple(listed[index]["allocation"])) not in known:
            raise UserError(
                f"{self.folder}: front.json and journal.jsonl are not of one run. Restore one, or resume the run"
            )
        return known[member]

    def _keep_bounds(self, where: Sequence[str], best: str | None, target: float | None) -> list[Outcome]:
        """Return the outcomes that keep all bounds and the target."""
        space, outcomes = self._journal.space, select_comparable(self._journal)
        if not outcomes:
            raise UserError(f"{self.folder}: nothing is measured on all tokens yet. Resume the search")
        known = {*space.fixed, *outcomes[0].measured}
        if best is not None and best not in known:
            raise UserError(f"--best: unknown figure {best!r}{did_you_mean(best, known)}")
        limits: list[tuple[str, str, float]] = []
        for text in where:
            bound = Bound.parse(text, known)
            if bound.relative and bound.name not in space.fixed:
                raise UserError(
                    f"--where {text!r}: {bound.name} is measured, and has no share of the dense model's. Give a number"
                )
            # a measurement is compared as a float, so that a bound that repeats its digits keeps it
            limit = bound.limit(space) if bound.name in space.fixed else float(bound.amount)
            limits.append((text, bound.name, limit))
        if target is not None:
            limits.append((f"target {target}", "params", budget_for(space, target).limits["params"]))
        for text, name, limit in limits:
            kept = [outcome for outcome in outcomes if figure(space, outcome, name) <= limit]
            if not kept:
                least = min((figure(space, outcome, name) for outcome in outcomes), default=0.0)
                shown = format_cost(name, int(least)) if name in space.fixed else f"{least:.4f}"
                raise UserError(
                    f"{self.folder}: no measured allocation keeps {text}; the least {name} among them is {shown}. "
                    "Allow more, or search with that constraint"
                )
            outcomes = kept
        return outcomes

    def _find_knee(self, outcomes: Sequence[Outcome]) -> Outcome:
        journal, names = self._journal, list_objectives(self._journal)
        members = pareto_front(journal.space, outcomes, names)
        figures = np.array([[figure(journal.space, outcome, name) for name in names] for outcome in members])
        return members[find_knee(figures, *box(journal, names))]

    def _find_least(self, outcomes: Sequence[Outcome], name: str) -> Outcome:
        space = self._journal.space
        return min(outcomes, key=lambda o: (figure(space, o, name), o.loss, o.request.allocation))

    def _budget_of(self, allocation: Allocation) -> Budget:
        """Return the budget that an allocation fills: its minimised costs, or the run's budget if there are none."""
        space = self._journal.space
        reached = {n: space.cost(allocation, n) for n in list_objectives(self._journal) if n in space.fixed}
        budget = Budget(**reached) if reached else self._journal.header.budget
        assert budget is not None, "the journal of a run has a budget"
        return budget


def open_run(folder: Path | str) -> Run:
    """Open a run, finished or not.

    Args:
        folder: The folder of the run.

    Raises:
        UserError: There is no run.
    """
    folder = Path(folder)
    if not (folder / "journal.jsonl").is_file() and not (folder / "plan.json").is_file():
        raise UserError(f"{folder}: no run. Name the folder of a run, such as runs/demo")
    return Run(folder)
