"""Search-based global sparsity allocation for transformers: a model and a budget in, a pruning plan out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from allocator.core.version import __version__

if TYPE_CHECKING:
    from allocator.commands.api import compare, evaluate, export, import_plan, inspect, prune, search
    from allocator.core.errors import UserError
    from allocator.core.plan import Plan


__all__ = [
    "Plan",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "import_plan",
    "inspect",
    "prune",
    "search",
]

_HOMES = {"Plan": "core.plan", "UserError": "core.errors"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the command line starts quickly."""
    if name not in __all__:
        raise AttributeError(f"module 'allocator' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"allocator.{_HOMES.get(name, 'commands.api')}"), name)
