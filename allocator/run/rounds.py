"""The step from one round of a search to the next: a job with finer ladders, and a record of earlier rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from allocator.core.header import JournalHeader
from allocator.core.space import SearchSpace
from allocator.model.family.space import build_space
from allocator.run.job import Job
from allocator.run.model import with_serving_costs
from allocator.searchers.coarse_to_fine import Round, fill_budget, refine_ladders, translate
from allocator.searchers.study import Decision


def prepare_next_round(job: Job, decision: Decision) -> Job:
    """Return the job of the next round. ``decision`` is the result of this round."""
    config, baselines = job.config, (decision.uniform, decision.two_rate)
    space = build_space(
        job.layout,
        job.checkpoint,
        config.pattern,
        job.target,
        refine_ladders(job.space, decision.searched, baselines),
        config.ladder.align,
        bias=config.pruner.bias,
    )
    space = with_serving_costs(config, job.checkpoint, job.layout, space)
    chosen, uniform, two_rate = (translate(a, job.space, space) for a in (decision.searched, *baselines))
    return _in_round(
        job, space, Round(fill_budget(space, chosen, job.budget), uniform, two_rate, list_rounds(job, decision))
    )


def restore_round(job: Job, header: JournalHeader) -> Job:
    """Return the job of the round that a journal belongs to. ``job`` is the job of the first round."""
    if header.round is None:
        return job
    return _in_round(job, header.space, Round.from_json(header.round))


def list_rounds(job: Job, decision: Decision) -> tuple[Mapping[str, Any], ...]:
    """Return what each round spent and reached, up to and including the round of ``job``."""
    own = {
        "evaluations": decision.spent.evaluations,
        "candidate_tokens": round(decision.spent.tokens),
        "ended": decision.ended,
        "losses": dict(decision.losses),
    }
    return (*(() if job.round is None else job.round.earlier), own)


def _in_round(job: Job, space: SearchSpace, begun: Round) -> Job:
    # only if the configuration asks for it: weights made along the incumbent's path favour the incumbent
    along = begun.incumbent if job.config.pruner.inputs == "path" else None
    return replace(job, space=space, along=along, round=begun)
