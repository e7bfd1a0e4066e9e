"""What searchers themselves cost: CPU time of ask and tell per candidate, on 500 units of 16 levels.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead

Losses are computed from a formula, a quadratic form of low rank and a diagonal for each of eight sequences, which takes
no time that is counted; batches are of 64. Prints a table and writes `results/overhead.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allocator.core.budget import Budget
from allocator.core.protocols import Expansion, Outcome, Request
from allocator.core.space import Allocation, SearchSpace, Unit
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.methods.guided import GuidedSettings
from allocator.searchers.problem import SearchProblem
from allocator.searchers.rules.baselines import uniform
from allocator.searchers.settings import SearchSettings

RESULTS = Path(__file__).parent / "results"
UNITS, LEVELS, BATCH, LENGTH = 500, 16, 64, 512
TOKENS = (LENGTH, 2 * LENGTH, 8 * LENGTH)
CANDIDATES = 2000


class Formula:
    """A loss on eight sequences, with or without expansions."""

    def __init__(self, space: SearchSpace, gradients: bool) -> None:
        rng = np.random.default_rng(0)
        self.sparsity_ul = np.array([[unit.sparsity(level) for level in range(LEVELS)] for unit in space.units])
        self.diagonal_su = rng.lognormal(size=UNITS) * (1 + 0.2 * rng.standard_normal((8, UNITS)))
        self.rank_ru = rng.standard_normal((4, UNITS)) / UNITS**0.5
        self.gradients = gradients

    def answer(self, request: Request) -> Outcome:
        """Return the outcome of a request."""
        at_u = self.sparsity_ul[np.arange(UNITS), request.allocation]
        diagonal_su = self.diagonal_su[: request.tokens // LENGTH]
        common_r = self.rank_ru @ at_u
        parts = diagonal_su @ at_u**2 + (common_r**2).sum()
        expansion = None
        if request.probe == "expansion" and self.gradients:
            move_ul = self.sparsity_ul - at_u[:, None]
            gradient_u = 2 * (diagonal_su.mean(0) * at_u + self.rank_ru.T @ common_r)
            rows = [tuple(map(tuple, table.tolist())) for table in (gradient_u[:, None] * move_ul, move_ul**2)]
            expansion = Expansion(*rows)
        return Outcome(
            request=request,
            measured={"kl": float(parts.mean())},
            wall_s=0.0,
            loss_name="kl",
            sequence_losses=tuple(parts.tolist()),
            expansion=expansion,
        )


def made_space() -> SearchSpace:
    """Return matrices of 500 sizes with even ladders."""
    units = []
    for index, size in enumerate(np.random.default_rng(1).integers(200, 2000, UNITS).tolist()):
        kept = tuple(size * (LEVELS - level) for level in range(LEVELS))
        units.append(
            Unit(
                name=f"matrix{index}",
                kind="matrix",
                part="mlp",
                block=index // 4,
                total=kept[0],
                kept=kept,
                params=kept,
                macs=kept,
            )
        )
    return SearchSpace("unstructured", tuple(units), {"params": 0, "macs": 0})


def measure(settings: SearchSettings, gradients: bool) -> dict[str, Any]:
    """Run a search, and return what asking and telling took for each candidate."""
    space = made_space()
    budget, formula = Budget(params=space.limit_for(0.5)), Formula(space, gradients)
    start: list[Allocation] = [uniform(space, budget)]
    seconds, candidates = 0.0, 0

    def timed(call: Any, *arguments: Any) -> Any:
        nonlocal seconds
        begun = time.process_time()
        answer = call(*arguments)
        seconds += time.process_time() - begun
        return answer

    searcher = timed(
        settings.configured.make, SearchProblem(space=space, budget=budget, objectives=("kl",), start=start, seed=0)
    )
    while candidates < CANDIDATES and (requests := timed(searcher.ask)):
        outcomes: Sequence[Outcome] = [formula.answer(request) for request in requests]
        timed(searcher.tell, outcomes)
        candidates += sum(not request.probe for request in requests)
    return {"candidates": candidates, "ms": round(1000 * seconds / candidates, 2), "ended": searcher.ended()}


def main() -> None:
    evolution = EvolutionSettings(offspring=BATCH, tokens=TOKENS[1:], survivors=(BATCH // 8, 1), generations=10**6)
    settings = SearchSettings(
        tokens=TOKENS, evolution=evolution, guided=GuidedSettings(entrants=BATCH, patience=100, generations=10**6)
    )
    found = {
        "evolution": measure(replace(settings, method="evolution"), gradients=False),
        "guided, with gradients": measure(replace(settings, method="guided"), gradients=True),
        "guided, without": measure(replace(settings, method="guided"), gradients=False),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    print("| search | candidates | CPU ms a candidate | target |\n|---|---|---|---|")
    for name, line in found.items():
        print(f"| {name} | {line['candidates']:,} | {line['ms']:.2f} | 1 |")


if __name__ == "__main__":
    main()
