"""Plans with their provenance: every plan is made here, from the header of the run that it belongs to."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

from allocator.core.budget import Budget
from allocator.core.files import fingerprint
from allocator.core.header import JournalHeader
from allocator.core.plan import Plan
from allocator.core.space import Allocation
from allocator.core.version import __version__

_PACKAGES = ("torch", "transformers", "numpy", "ray", "optuna", "pymoo")


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that results depend on."""
    own = {"python": platform.python_version(), "allocator": __version__}
    return {**own, **{name: metadata.version(name) for name in _PACKAGES}}


def make_plan(
    header: JournalHeader,
    allocation: Allocation,
    budget: Budget,
    measured: Mapping[str, Mapping[str, float]],
    target: float | None = None,
) -> Plan:
    """Return the plan of an allocation.

    Args:
        header: What the run is.
        allocation: One level per unit of the header's space.
        budget: What the allocation keeps to.
        measured: Figures by name, as :attr:`Plan.measured <allocator.core.plan.Plan.measured>` has them.
        target: The share to remove, if one was named.
    """
    return Plan(
        model=header.model,
        space=header.space,
        allocation=allocation,
        budget=budget,
        pruner=header.pruner,
        measured=measured,
        provenance={
            "run": fingerprint(header.identity),
            "searcher": header.method,
            "seed": header.seed,
            **({} if target is None else {"target": target}),
            "workload": header.workload,
            **({} if header.training is None else {"training": header.training}),
            "versions": header.versions,
        },
    )
