"""``plan.json`` and ``result.json`` of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocator.core.budget import Budget
from allocator.core.costs import COSTS
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.core.provenance import collect_versions, make_plan
from allocator.core.results import RESULT_KIND, RESULT_SCHEMA, Figures
from allocator.core.training_effect import summarise_training
from allocator.run.job import Job
from allocator.run.rounds import list_rounds
from allocator.searchers.study import Decision


def make_run_plan(job: Job, decision: Decision, measured: Mapping[str, Figures]) -> Plan:
    """Return the plan that a search decided on. The budget of a front's member is what the member costs."""
    reached = {cost: job.space.cost(decision.searched, cost) for cost in job.config.objectives if cost in COSTS}
    budget = Budget(**{**job.budget.limits, **reached})
    return make_plan(job.make_header(), decision.searched, budget, measured, job.config.target)


def summarise_run(
    job: Job, journal: Journal, decision: Decision, plan: Plan, wall_s: Mapping[str, float]
) -> dict[str, Any]:
    """Return the content of ``result.json``, without latencies."""
    space, rounds = job.space, list_rounds(job, decision)
    named = {"uniform": decision.uniform, "two_rate": decision.two_rate, "searched": decision.searched}
    units = [
        {
            "name": unit.name,
            "part": unit.part,
            "kind": unit.kind,
            "block": unit.block,
            "sparsity": {name: round(unit.sparsity(a[index]), 6) for name, a in named.items()},
        }
        for index, unit in enumerate(space.units)
    ]
    return {
        "schema": RESULT_SCHEMA,
        "kind": RESULT_KIND,
        "model": dict(plan.model),
        "pattern": space.pattern,
        "asked": job.config.asked,
        "target": job.target,
        "method": job.config.search.method_name,
        "seed": job.config.seed,
        "budget": plan.to_json()["budget"],
        "measured": {name: dict(figures) for name, figures in plan.measured.items()},
        "units": units,
        "search": {
            **rounds[-1],
            "evaluations": sum(line["evaluations"] for line in rounds),
            "candidate_tokens": sum(line["candidate_tokens"] for line in rounds),
            "store_tokens": job.tokens["calibration"].num_tokens * len(rounds),
            "rounds": list(rounds),
            **({"training": summarise_training(journal)} if job.config.search.training else {}),
        },
        "wall_s": {name: round(seconds, 2) for name, seconds in wall_s.items()},
        "tokens": {split: examples.num_tokens for split, examples in job.tokens.items()},
        "versions": collect_versions(),
    }
