"""The main job on the packaged model over seeds: searched against uniform and two-rate uniform.

    python benchmarks/main_job.py --runs-dir /tmp/main_job

Does `allocator search search_spaces/runs/PATTERN.yaml --seed SEED` for each case and seed, and writes
`results/main_job.json`, a table on standard output and `results/main_job.svg`. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

import allocator
from allocator.model.family.schema import find_families_folder
from allocator.run.reporting import Live

RESULTS = Path(__file__).parent / "results"
CASES = {
    "structured 50%": ("structured", "obs"),
    "unstructured 60%": ("unstructured", "sparsegpt"),
    "unstructured 60%, Wanda": ("unstructured", "wanda"),
}
"""Run file of each pattern, and the local pruner."""

ROWS = ("uniform", "two_rate", "searched")


def run(case: str, seed: int, runs_dir: Path, settings: list[str]) -> dict:
    pattern, pruner = CASES[case]
    name = f"{pattern}-{pruner}-seed{seed}"
    done = runs_dir / name / "result.json"
    if done.exists():
        return {"case": case, **json.loads(done.read_text())}
    with Live() as live:
        resume = (runs_dir / name).exists()
        result = allocator.search(
            config=find_families_folder() / "runs" / f"{pattern}.yaml",
            seed=seed,
            name=name,
            runs_dir=runs_dir,
            settings=[f"pruner.name={pruner}", f"store={runs_dir / f'levels-{pattern}-{pruner}'}", *settings],
            resume=resume,
            reporter=live,
        )
    return {"case": case, **result.summary}


def table(results: list[dict]) -> str:
    lines = [
        "| case | seed | parameters | uniform KL | two-rate KL | searched KL | vs uniform | vs two-rate "
        "| searched perplexity | evaluations | candidate-tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        measured, spent = result["measured"], result["search"]
        uniform, two_rate, searched = (measured[name]["kl"] for name in ROWS)
        lines.append(
            f"| {result['case']} | {result['seed']} | {measured['searched']['params']:,} "
            f"| {uniform:.4f} | {two_rate:.4f} | {searched:.4f} | {searched / uniform - 1:+.1%} "
            f"| {searched / two_rate - 1:+.1%} | {measured['searched']['perplexity']:.2f} "
            f"| {spent['evaluations']:,} | {spent['candidate_tokens']:,} | {result['wall_s']['total']:.0f} |"
        )
    return "\n".join(lines)


def figure(results: list[dict]) -> Figure:
    picture = Figure(figsize=(7.2, 2.8), layout="constrained")
    for axes, case in zip(picture.subplots(1, len(CASES)), CASES, strict=True):
        chosen = [r for r in results if r["case"] == case]
        for index, row in enumerate(ROWS):
            values = [r["measured"][row]["kl"] for r in chosen]
            axes.bar(index, sum(values) / len(values), color="#0072b2" if row == "searched" else "#bbbbbb")
            axes.plot([index] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(ROWS)), [row.replace("_", "\n") for row in ROWS], fontsize=7)
        axes.set_title(case, fontsize=9)
        axes.set_ylabel("held-out KL, nats per token", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    results = [run(case, seed, arguments.runs_dir, arguments.settings) for case in CASES for seed in arguments.seeds]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "main_job.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(results).savefig(RESULTS / "main_job.svg", metadata={"Date": None})
    print(table(results))


if __name__ == "__main__":
    main()
