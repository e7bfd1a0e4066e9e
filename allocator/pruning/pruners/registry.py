"""The local pruners by name, and how one is made from a configuration or a plan."""

from __future__ import annotations

from collections.abc import Mapping

from allocator.core.errors import UserError
from allocator.pruning.pruners.magnitude_wanda import Magnitude, Wanda
from allocator.pruning.pruners.obs import Obs
from allocator.pruning.pruners.protocol import LocalPruner, PrunerSpec, PrunerType
from allocator.pruning.pruners.sparsegpt import SparseGpt

PRUNERS: Mapping[str, PrunerType] = {
    "obs": Obs,
    "sparsegpt": SparseGpt,
    "wanda": Wanda,
    "magnitude": Magnitude,
}
"""The local pruners by name. The default of a pattern is the first that serves it."""


def pruners_for(pattern: str) -> tuple[str, ...]:
    """Return the names of the pruners that serve a pattern, the default first."""
    return tuple(name for name, pruner in PRUNERS.items() if pattern in pruner.patterns)


def make_pruner(spec: PrunerSpec, pattern: str) -> LocalPruner:
    """Return the local pruner of a specification.

    Args:
        spec: Its name and settings.
        pattern: The pattern that it prunes to.

    Raises:
        UserError: No pruner of that name serves the pattern, or it cannot fit a bias.
    """
    names = pruners_for(pattern)
    name = names[0] if spec.name is None else spec.name
    if name not in names:
        raise UserError(f"pruner.name: {name!r} does not serve {pattern} pruning; these do: {', '.join(names)}")
    pruner = PRUNERS[name].from_spec(spec)
    if spec.bias and not (pruner.refit and pruner.refit.intercept):
        raise UserError(f"pruner.bias: {name} fits no bias; structured pruning does. Leave it out")
    return pruner
