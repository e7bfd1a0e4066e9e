"""The plan: the chosen allocation as a file, keyed by module name, with its provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from allocator.core.budget import Budget
from allocator.core.costs import COSTS, from_units, known_costs, to_units
from allocator.core.errors import UserError
from allocator.core.files import check_name, read_json, write_json
from allocator.core.space import Allocation, SearchSpace

SCHEMA = 3


@cache
def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``plan.json``, as shipped in the package."""
    text = (resources.files("allocator.core") / "plan.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An allocation with the name of every unit, what it costs, and what was measured.

    Attributes:
        model: ``id``, ``architecture`` and ``fingerprint`` of the dense model.
        space: The search space that the levels refer to.
        allocation: One level per unit of ``space``.
        budget: The limits that the allocation keeps.
        pruner: Name, settings and calibration fingerprint of the local pruner.
        measured: Figures of the executed checkpoints, by name (``dense``, ``uniform``, ``searched``, ...).
        provenance: Configuration hash, searcher, seed and package versions.
    """

    model: Mapping[str, str]
    space: SearchSpace
    allocation: Allocation
    budget: Budget
    pruner: Mapping[str, Any]
    measured: Mapping[str, Mapping[str, float]]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``plan.json``: no time, host, path, run name or worker count."""
        space, allocation = self.space, self.allocation
        units = {
            unit.name: {
                "kind": unit.kind,
                "part": unit.part,
                "block": unit.block,
                "group": unit.group,
                "level": level,
                "sparsity": round(unit.sparsity(level), 6),
                "kept": unit.kept[level],
                "total": unit.total,
                "ladder": {
                    "kept": list(unit.kept),
                    **{cost: [from_units(cost, each) for each in unit.costs(cost)] for cost in known_costs(space)},
                },
            }
            for unit, level in zip(space.units, allocation, strict=True)
        }
        return {
            "schema": SCHEMA,
            "kind": "allocator.plan",
            "model": dict(self.model),
            "pattern": space.pattern,
            "budget": {
                cost: {"limit": from_units(cost, limit), "achieved": from_units(cost, space.cost(allocation, cost))}
                for cost, limit in self.budget.limits.items()
            },
            "costs": {
                cost: {
                    "achieved": from_units(cost, space.cost(allocation, cost)),
                    "dense": from_units(cost, space.cost(space.dense, cost)),
                    "fixed": from_units(cost, space.fixed[cost]),
                }
                for cost in known_costs(space)
            },
            "sparsity": round(space.sparsity(allocation), 6),
            "units": units,
            "pruner": dict(self.pruner),
            "measured": {name: dict(figures) for name, figures in self.measured.items()},
            "provenance": dict(self.provenance),
        }

    def save(self, path: Path | str) -> None:
        """Write ``plan.json`` atomically."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read and check a plan.

        Raises:
            UserError: The file is missing, not JSON, or not of the schema, or its figures disagree.
        """
        import jsonschema

        path = Path(path)
        data = read_json(path, "plan")
        try:
            jsonschema.validate(data, json_schema())
        except jsonschema.ValidationError as error:
            where = error.json_path.removeprefix("$.") or "the file"
            raise UserError(
                f"{path}: not a plan of schema {SCHEMA}: at {where}: {error.message}. Make it again with a search"
            ) from None
        for name, unit in data["units"].items():
            check_name(name, path)
            kept, level = unit["ladder"]["kept"], unit["level"]
            if kept != sorted({*kept, unit["total"]}, reverse=True) or len({*map(len, unit["ladder"].values())}) != 1:
                raise UserError(f"{path}: unit {name!r}: its ladder does not fall from {unit['total']} level by level")
            if unit["ladder"].keys() != {"kept", *data["costs"]}:
                raise UserError(f"{path}: unit {name!r}: its ladder does not have the costs {', '.join(data['costs'])}")
            group = unit["group"] or unit["total"]
            if unit["total"] % group or any(count % (unit["total"] // group) for count in kept):
                raise UserError(f"{path}: unit {name!r}: its ladder does not take the same from every {group} items")
            if level >= len(kept) or kept[level] != unit["kept"]:
                raise UserError(f"{path}: unit {name!r}: level {level} does not keep {unit['kept']} items")
        if unknown := data["costs"].keys() - COSTS.keys():
            raise UserError(f"{path}: unknown costs: {', '.join(sorted(unknown))}. Restore it")
        if unknown := data["budget"].keys() - data["costs"].keys():
            raise UserError(
                f"{path}: its budget bounds {', '.join(sorted(unknown))}, but its units do not have that cost"
            )
        plan = cls._from_json(data)
        for cost, figures in data["budget"].items():
            achieved = from_units(cost, plan.space.cost(plan.allocation, cost))
            if achieved != figures["achieved"] or achieved > figures["limit"]:
                raise UserError(
                    f"{path}: the units cost {achieved} {cost}, and the plan says {figures['achieved']} within a limit "
                    f"of {figures['limit']}. The file was edited by hand: search again, or restore it"
                )
        if (again := plan.to_json()) != data:
            wrong = ", ".join(key for key in again if again[key] != data[key])
            raise UserError(
                f"{path}: figures under {wrong} disagree with the units' levels. The file was edited by hand: "
                "search again, or restore it"
            )
        return plan

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Plan:
        fixed = {cost: to_units(cost, figures["fixed"]) for cost, figures in data["costs"].items()}
        units = [
            {
                "name": name,
                **{key: unit[key] for key in ("kind", "part", "block", "group", "total")},
                **{key: unit["ladder"][key] for key in ("kept", "params", "macs")},
                "others": {
                    cost: [to_units(cost, each) for each in unit["ladder"][cost]]
                    for cost in fixed
                    if cost not in ("params", "macs")
                },
            }
            for name, unit in data["units"].items()
        ]
        return cls(
            model=data["model"],
            space=SearchSpace.from_json({"pattern": data["pattern"], "units": units, "fixed": fixed}),
            allocation=tuple(unit["level"] for unit in data["units"].values()),
            budget=Budget(**{cost: to_units(cost, figures["limit"]) for cost, figures in data["budget"].items()}),
            pruner=data["pruner"],
            measured=data["measured"],
            provenance=data["provenance"],
        )
