"""How well a latency table predicts whole models: random allocations of two models, on one CPU thread.

    python -m benchmarks.latency [--repeats 20] [--tables 2]

Tables are made one after the other, and after each of them whole models are measured. Shared machines have slow seconds
and slow minutes: the dense model beside the others tells how much of an error is the machine's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from allocator.core.costs import from_units
from allocator.core.latency import LatencySettings
from allocator.core.provenance import collect_versions
from allocator.evaluation.latency import describe, make_table, measure
from allocator.model.family.serving_costs import Workload, add_serving_costs
from allocator.run.config.load import load_config
from allocator.run.model import read_model
from benchmarks.engine import random_model

FILE = Path(__file__).parent / "results" / "latency.json"
WORK = {"packaged": Workload(1, 512, 64), "d768": Workload(1, 128, 16)}
ALLOCATIONS = 6


def errors(model: str, repeats: int, seed: int) -> list[dict[str, float]]:
    """Return, of the dense model and of random allocations, relative errors of a table that is made for them."""
    work = WORK[model]
    with tempfile.TemporaryDirectory() as folder:
        given = {} if model == "packaged" else {"model": str(random_model(Path(folder)))}
        checkpoint, layout, space = read_model(load_config(None, {"workers": 0, **given}))
        settings = LatencySettings(
            batch=work.batch,
            prompt=work.prompt,
            generate=work.generate,
            dtype="float32",
            threads=1,
            repeats=repeats,
        )
        table = make_table(checkpoint, layout, space, settings, "cpu", collect_versions())
        space = add_serving_costs(space, layout, checkpoint, work, table)
        rng = np.random.default_rng(seed)
        drawn = [tuple(int(rng.integers(unit.num_levels)) for unit in space.units) for _ in range(ALLOCATIONS)]
        allocations = [space.dense, *drawn]
        shapes = [{u.name: u.kept[level] for u, level in zip(space.units, a, strict=True)} for a in allocations]
        measured = measure(checkpoint, layout, shapes, settings, "cpu")
    return [
        {
            name: from_units(name, space.cost(allocation, name)) / milliseconds - 1
            for name, milliseconds in figures.items()
        }
        for allocation, figures in zip(allocations, measured, strict=True)
    ]


def table(found: dict[str, Any]) -> str:
    """Return the errors in words."""
    lines = [
        "| model | figure | dense, each table | random allocations: median error | largest | within 10 % |",
        "|---|---|---|---|---|---|",
    ]
    for model, tables in found["errors"].items():
        for name in ("prefill_ms", "decode_ms", "latency_ms"):
            dense = ", ".join(f"{rows[0][name]:+.1%}" for rows in tables)
            size = [abs(row[name]) for rows in tables for row in rows[1:]]
            inside = sum(each <= 0.1 for each in size)
            lines.append(
                f"| {model} | {name} | {dense} | {median(size):.1%} | {max(size):.1%} | {inside} of {len(size)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tables", type=int, default=2)
    arguments = parser.parse_args()
    found = {
        "device": describe("cpu"),
        "errors": {
            model: [errors(model, arguments.repeats, seed) for seed in range(arguments.tables)] for model in WORK
        },
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
