"""Search-based global sparsity allocation for transformers: a model and a budget in, a pruning plan out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.api import compare, evaluate, export, import_plan, inspect, prune, search
    from allocator.core.errors import UserError
    from allocator.core.plan import Plan

__version__ = "0.1.0"
__all__ = ["Plan", "UserError", "compare", "evaluate", "export", "import_plan", "inspect", "prune", "search"]

_HOMES = {"Plan": "core.plan", "UserError": "core.errors"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the command line starts quickly."""
    if name not in __all__:
        raise AttributeError(f"module 'allocator' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"allocator.{_HOMES.get(name, 'api')}"), name)


class _Package(ModuleType):
    """Keeps ``allocator.search`` the verb: importing the subpackage of that name would put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
