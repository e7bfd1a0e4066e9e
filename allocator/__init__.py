"""Search-based global sparsity allocation for transformers: a model and a budget in, a pruning plan out.

The verbs of the command line are functions here. ``docs/python.md`` describes them.

- ``commands``    one file per verb
- ``run``         configuration, folder, status and rounds of a run
- ``core``        the vocabulary: space, budget, journal, plan
- ``searchers``   what proposes allocations
- ``model``       checkpoints, families, data, live models
- ``pruning``     local pruners, calibration, level stores
- ``evaluation``  what measures allocations
- ``pool``        Ray workers and jobs
- ``interop``     plans for other tools, and theirs
- ``report``      tables, figures and the page of a run
- ``testing``     contract suites, for searchers, pruners, evaluators and targets of your own
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from allocator.core.version import __version__

if TYPE_CHECKING:
    from allocator.commands.compare import compare
    from allocator.commands.evaluate import evaluate
    from allocator.commands.export import export
    from allocator.commands.import_plan import import_plan
    from allocator.commands.inspect import explain, inspect, suggest_family
    from allocator.commands.latency import measure_latency
    from allocator.commands.open_run import open_run
    from allocator.commands.prune import prune
    from allocator.commands.report import write_report
    from allocator.commands.search import search
    from allocator.commands.submit import submit
    from allocator.core.errors import UserError
    from allocator.core.plan import Plan
    from allocator.run.config.run import RunConfig
    from allocator.run.status import read_status

__all__ = [
    "Plan",
    "RunConfig",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "explain",
    "export",
    "import_plan",
    "inspect",
    "measure_latency",
    "open_run",
    "prune",
    "read_status",
    "search",
    "submit",
    "suggest_family",
    "write_report",
]

_MODULES = {
    "Plan": "core.plan",
    "RunConfig": "run.config.run",
    "UserError": "core.errors",
    "explain": "commands.inspect",
    "measure_latency": "commands.latency",
    "read_status": "run.status",
    "suggest_family": "commands.inspect",
    "write_report": "commands.report",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts quickly."""
    if name not in __all__:
        raise AttributeError(f"module 'allocator' has no attribute {name!r}")
    return getattr(import_module(f"allocator.{_MODULES.get(name, f'commands.{name}')}"), name)
