"""Contract suites as pytest classes: inherit one, say what to test, and run pytest. Needs ``allocator[testing]``.

- ``searchers``   `SearcherContract`: what every search method promises
- ``fronts``      `FrontContract`: what a method that finds fronts promises
- ``pruners``     `PrunerContract`: what every local pruner promises
- ``evaluators``  `EvaluatorContract`: what every evaluator promises
- ``targets``     `TargetContract`: what every export target promises
- ``suites``      one test class for each member of a registry
- ``runs``        searches to their end, and evaluators that fail or answer out of order
- ``landscapes``  losses that are functions of the allocation alone, in place of a model
- ``spaces``      search spaces without a model
- ``problems``    problems for local pruners
- ``models``      a tiny model, its engine and its plans
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from allocator.testing.evaluators import EvaluatorContract
    from allocator.testing.fronts import FrontContract
    from allocator.testing.pruners import PrunerContract
    from allocator.testing.searchers import SearcherContract
    from allocator.testing.targets import TargetContract

__all__ = ["EvaluatorContract", "FrontContract", "PrunerContract", "SearcherContract", "TargetContract"]

_MODULES = {
    "EvaluatorContract": "evaluators",
    "FrontContract": "fronts",
    "PrunerContract": "pruners",
    "SearcherContract": "searchers",
    "TargetContract": "targets",
}

# a failed assertion of a suite then shows its values
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _MODULES.values()))


def __getattr__(name: str) -> Any:
    """Import a suite when it is first used: those of searchers need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
