"""The field's allocation rules against `auto`, each saved, reloaded and measured on held-out text, on every store.

    python -m benchmarks.rules --runs-dir /tmp/rules [--stores structured-50 ...]
    python -m benchmarks.rules

Does `allocator search`, as it comes and in one round, and `allocator compare --rule ...` on the level store of the
latter, and writes `results/rules.json`, a table on standard output and `results/rules.svg`. What was run is not run
again. Without `--runs-dir` table and figure are made again from `results/rules.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import allocator
from allocator.commands.compare import choose_rules
from allocator.run.reporting import Live
from benchmarks.search_quality import HELD_OUT, STORES, Store

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "rules.json"


def run(name: str, store: Store, runs_dir: Path) -> dict[str, Any]:
    """Search and compare on one store; return held-out KL by rule, and of searches with what they spent."""
    common: dict[str, Any] = {
        "model": runs_dir / store.model if store.model else None,
        "pattern": store.pattern,
        "target": store.target,
        "runs_dir": runs_dir,
        "settings": [f"tokens.test={HELD_OUT}", f"store={runs_dir / name}-levels"],
    }
    searches = {}
    with Live() as live:
        for which, rounds in {"auto": [], "one round": ["search.rounds=1"]}.items():
            own = f"{name}-{which.replace(' ', '-')}"
            settings = {**common, "settings": [*common["settings"], *rounds]}
            if not (runs_dir / own / "result.json").exists():
                allocator.search(name=own, resume=(runs_dir / own).exists(), reporter=live, **settings)
            result = json.loads((runs_dir / own / "result.json").read_text())
            searches[which] = {
                "kl": result["measured"]["searched"]["kl"],
                "evaluations": result["search"]["evaluations"],
                "candidate_tokens": result["search"]["candidate_tokens"],
            }
        compared = allocator.compare(
            name=f"{name}-rules",
            rules=choose_rules(store.pattern),
            resume=(runs_dir / f"{name}-rules").exists(),
            reporter=live,
            **common,
        )
    return {"searches": searches, "kl": {rule: line["kl"] for rule, line in compared.measured.items()}}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return one line per store: the searches, the margin over the best rule, and the rules in order."""
    lines = [
        "| store | `auto` | tokens | in one round | tokens | best rule | `auto` against it | rules |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for store, result in results.items():
        rules = sorted((kl, name) for name, kl in result["kl"].items() if name != "dense")
        best, auto = rules[0], result["searches"]["auto"]["kl"]
        listed = ", ".join(f"{name} {kl:.4f}" for kl, name in rules)
        both = " | ".join(f"{one['kl']:.4f} | {one['candidate_tokens']:,}" for one in result["searches"].values())
        lines.append(f"| {store} | {both} | {best[1]} {best[0]:.4f} | {auto / best[0] - 1:+.1%} | {listed} |")
    return "\n".join(lines)


def figure(results: dict[str, dict[str, Any]]) -> Figure:
    """Draw the held-out KL of every rule beside that of the search."""
    picture = Figure(figsize=(9.0, 0.5 + 0.32 * len(results)), layout="constrained")
    axes = picture.subplots()
    for row, result in enumerate(results.values()):
        auto = result["searches"]["auto"]["kl"]
        ratios = [kl / auto for name, kl in result["kl"].items() if name != "dense"]
        axes.plot(ratios, [row] * len(ratios), "o", color="#d55e00", alpha=0.6, ms=5, mew=0)
    axes.axvline(1.0, color="#0072b2", lw=1.5)
    axes.set(xscale="log", xlabel="held-out KL of a rule, in that of auto", yticks=range(len(results)))
    axes.set_yticklabels(list(results), fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs-dir", type=Path, help="where runs are kept; without it nothing is run")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES))
    arguments = parser.parse_args()
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    if arguments.runs_dir is not None:
        for name in arguments.stores:
            results[name] = run(name, STORES[name], arguments.runs_dir)
            results = {store: results[store] for store in STORES if store in results}
            FILE.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    figure(results).savefig(RESULTS / "rules.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
