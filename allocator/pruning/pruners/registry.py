"""The local pruners by name, and how one is made from a configuration or a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocator.core.errors import UserError
from allocator.core.user_objects import check_object, make_plain
from allocator.pruning.calibration.statistics import KINDS
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


def check_own_pruner(pruner: LocalPruner, pattern: str) -> LocalPruner:
    """Return a pruner that the user passed from Python.

    Args:
        pruner: The pruner.
        pattern: The pattern that it has to serve.

    Raises:
        UserError: It is a class, lacks something, does not serve the pattern, or has settings that cannot be recorded.
    """
    check_object(pruner, "pruner", ("name", "patterns", "need", "refit", "settings", "levels"))
    kind = type(pruner).__name__
    if pruner.name in PRUNERS and not isinstance(pruner, PRUNERS[pruner.name]):  # type: ignore[arg-type]
        raise UserError(f"pruner: {kind} has the name of the package's {pruner.name!r}. Give it another name")
    if pruner.need not in KINDS:
        raise UserError(f"pruner: {kind}.need: expected {', '.join(KINDS)}, found {pruner.need!r}")
    if pruner.refit is not None and pruner.need != "gram":
        raise UserError(f"pruner: {kind} refits, which needs the Gram matrix. Set its need to 'gram', or refit to None")
    if pattern not in pruner.patterns:
        raise UserError(
            f"pruner: {pruner.name!r} serves {', '.join(pruner.patterns)} pruning, and the pattern is {pattern}. "
            f"Use --pattern {pruner.patterns[0]}"
        )
    make_plain(pruner.settings(), f"pruner: {kind}.settings()")
    return pruner


def choose_plan_pruner(record: Mapping[str, Any], pattern: str, own: LocalPruner | None) -> LocalPruner:
    """Return the local pruner of a plan.

    Args:
        record: ``pruner`` of the plan.
        pattern: The pattern of the plan.
        own: The pruner that the user passed from Python, if any.

    Raises:
        UserError: The plan's pruner is the user's own and was not passed, or another was passed.
    """
    if own is None:
        if record["name"] not in PRUNERS:
            raise UserError(
                f"plan: its pruner {record['name']!r} is not part of the package. Prune from Python, and pass the "
                "pruner: allocator.prune(plan, out, pruner=...)"
            )
        return make_pruner(PrunerSpec.from_plan(record), pattern)
    check_own_pruner(own, pattern)
    given = {"name": own.name, **make_plain(own.settings(), "pruner: its settings")}
    recorded = {key: record.get(key) for key in given}
    if given != recorded:
        raise UserError(
            f"pruner: the plan was made with {recorded}, and this pruner is {given}. Pass the plan's pruner"
        )
    return own
