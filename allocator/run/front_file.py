"""``front.json`` of a run: rewritten as the search goes on, with the figures that tell how far it is."""

from __future__ import annotations

import time

from allocator.core.budget import fits
from allocator.core.files import write_json
from allocator.core.journal import Journal
from allocator.core.outcomes import LOSSES, build_front, list_objectives, select_comparable
from allocator.run.job import Job
from allocator.run.recorder import Recorder
from allocator.searchers.hypervolume import Hypervolume

_INTERVAL_S = 0.5
"""The front is not written more often, however short the batches are."""

_SHARE = 10
"""Writing the front takes at most one second in this many, however long the journal is."""


class FrontWriter:
    """Writes the front of a search, and reports how good it is."""

    def __init__(self, job: Job, journal: Journal, recorder: Recorder) -> None:
        self._job, self._journal, self._recorder = job, journal, recorder
        self._due_s, self._figures = float("-inf"), ""
        self._volume: Hypervolume | None = None
        if job.config.objectives:
            self._volume = Hypervolume(journal, list_objectives(journal), job.config.search.fidelities[-1])

    def write_if_due(self) -> str:
        """Write the front, unless it was written a moment ago. Return its figures in words."""
        if (start_s := time.monotonic()) >= self._due_s:
            self._figures = self.write()
            self._due_s = time.monotonic() + max(_INTERVAL_S, _SHARE * (time.monotonic() - start_s))
        return self._figures

    def write(self) -> str:
        """Write the front, and return its figures in words."""
        figures, front = self._measure(), build_front(self._journal)
        volume = {} if self._volume is None else {"hypervolume": self._volume.to_json()}
        write_json(self._job.config.folder / "front.json", {**front, **volume})
        self._recorder.record_results(len(self._journal), len(front["points"]), figures)
        return "".join(f", {name} {value:.4f}" for name, value in figures.items())

    def _measure(self) -> dict[str, float]:
        """Return the hypervolume of a front, or the lowest loss within the budget."""
        if self._volume is not None:
            return {"hypervolume": self._volume.curve()[-1][-1]}
        job = self._job
        losses = [o.loss for o in select_comparable(self._journal) if fits(job.space, o.request.allocation, job.budget)]
        return {f"best {LOSSES[job.config.loss].split(',')[0]}": min(losses)} if losses else {}
