"""The header of a journal: what a run is, and everything that its outcomes depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from allocator.core.budget import Budget
from allocator.core.space import SearchSpace

NUMERICS = ("versions", "device", "micro_batch")
"""Fields that change outcomes by rounding only. A run may be resumed with other values, with a notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalHeader:
    """The first line of a journal.

    Attributes:
        space: The search space.
        budget: What every allocation keeps to; None in a journal that belongs to no run.
        identity: What two runs of one search have in common: settings and fingerprints.
        model: ``id``, ``architecture`` and ``fingerprint`` of the dense model.
        pruner: The local pruner, its settings and the fingerprint of its calibration text.
        asked: The objectives, target and constraints in words.
        method: The search method.
        seed: The seed of the search.
        loss: The measurement that is minimised.
        objectives: What is minimised in addition to the loss, or in its place; empty for a search at one budget.
        tokens: Fidelities of the search, increasing.
        selection: Tokens of the selection split.
        text: How much of each text the splits hold, by split and by the name of the text; empty without text.
        workload: What the plan's costs of serving are for.
        training: How candidates are trained; None where they are not.
        round: What the round begins with (see :class:`~allocator.searchers.coarse_to_fine.Round`); None for the first.
        device: Type of the device, with the capability of a CPU.
        micro_batch: Sequences that are computed together, and tokens of each.
        versions: Package versions by name.
    """

    space: SearchSpace
    budget: Budget | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    pruner: Mapping[str, Any] = field(default_factory=dict)
    asked: str = ""
    method: str = ""
    seed: int = 0
    loss: str = "kl"
    objectives: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    selection: int = 0
    text: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    round: Mapping[str, Any] | None = None
    device: str = ""
    micro_batch: tuple[int, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_json` reads. Optional fields without a value are left out."""
        optional: dict[str, Any] = {
            "budget": None if self.budget is None else dict(self.budget.limits),
            "objectives": list(self.objectives) or None,
            "text": dict(self.text) or None,
            "training": self.training,
            "round": self.round,
        }
        return {
            "space": self.space.to_json(),
            "identity": dict(self.identity),
            "model": dict(self.model),
            "pruner": dict(self.pruner),
            "asked": self.asked,
            "method": self.method,
            "seed": self.seed,
            "loss": self.loss,
            "tokens": list(self.tokens),
            "selection": self.selection,
            "workload": dict(self.workload),
            "device": self.device,
            "micro_batch": list(self.micro_batch),
            "versions": dict(self.versions),
            **{name: value for name, value in optional.items() if value is not None},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JournalHeader:
        """Read what :meth:`to_json` wrote.

        Raises:
            KeyError: The search space is missing.
            TypeError: A field has another type.
            ValueError: A value is not allowed, or a field is unknown.
        """
        known = {name: value for name, value in data.items() if name not in ("schema", "kind")}
        if unknown := known.keys() - set(cls.__slots__):
            raise ValueError(f"unknown field {min(unknown)!r}")
        space = SearchSpace.from_json(known.pop("space"))
        limits = known.pop("budget", None)
        for name in ("objectives", "tokens", "micro_batch"):
            known[name] = tuple(known.get(name, ()))
        return cls(space=space, budget=None if limits is None else Budget(**limits), **known)
