"""On paper: a search on a model of 70 B parameters, on 64 and 512 GPUs.

    python -m benchmarks.projection

What could be measured here is measured here: the driver's time and the utilisation of schedules (`scaling.py`), what
searchers take (`overhead.py`), bytes of requests and outcomes. What could not is assumed, and named in
:class:`Assumed`. Prints a table.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

from allocator.core.protocols import Outcome, Request

RESULTS = Path(__file__).parent / "results"
GB = 1e9


@dataclass(frozen=True)
class Assumed:
    """A Llama of 70 B parameters and the cluster.

    Attributes:
        flops: What a GPU does a second in bf16, at 40 % of its peak.
        share: Of the dense model's compute that a candidate at half of the parameters takes, prefixes shared.
        disk: Bytes a second at which a node reads what is on shared storage.
        bus: Bytes a second from a node's memory to one GPU.
        changed: Share of units that two allocations measured one after the other differ in.
    """

    blocks: int = 80
    width: int = 8192
    channels: int = 28672
    key_value: int = 1024
    vocabulary: int = 128256
    levels: int = 8
    tokens: int = 16384
    length: int = 2048
    flops: float = 4e14
    share: float = 0.45
    disk: float = 5 * GB
    bus: float = 50 * GB
    changed: float = 0.25
    per_node: int = 8
    evaluations: int = 10_000

    @property
    def params(self) -> float:
        block = self.width * (3 * self.channels + 2 * self.width + 2 * self.key_value)
        return self.blocks * block + 2 * self.vocabulary * self.width

    @property
    def store_bytes(self) -> float:
        """Refitted output projections in bf16: at each of eight levels, the eighths of the columns that are left."""
        left = sum(1 - level / self.levels for level in range(1, self.levels + 1))
        return 2 * left * self.blocks * self.width * (self.channels + self.width)

    @property
    def evaluation_s(self) -> float:
        compute = 2 * self.params * self.tokens * self.share / self.flops
        return compute + self.changed * self.store_bytes / self.levels / self.bus


def constants() -> dict[str, float]:
    """Return what was measured: milliseconds of the driver and of a searcher for each evaluation, and bytes."""
    scaling = json.loads((RESULTS / "scaling.json").read_text())
    overhead = json.loads((RESULTS / "overhead.json").read_text())
    request = Request(allocation=(3,) * 160, tokens=16384)
    outcome = Outcome(
        request=request,
        measured={"kl": 0.123, "nll": 2.5},
        wall_s=3.21,
        loss_name="kl",
        sequence_losses=tuple(0.1 + i / 1e3 for i in range(8)),
    )
    most = max(line["workers"] for line in scaling["simulated"])
    useful = {
        line["per_worker"]: line["useful"]
        for line in scaling["simulated"]
        if line["workers"] == most and line["schedule"] == "lag" and line["stragglers"]
    }
    return {
        "driver_ms": max(scaling["driver"]["workers"].values()),
        "searcher_ms": overhead["evolution"]["ms"],
        "sent_bytes": len(pickle.dumps([request])),
        "answered_bytes": len(pickle.dumps([outcome])),
        "useful": useful[4],
    }


def main() -> None:
    assumed, measured = Assumed(), constants()
    driver_s = (measured["driver_ms"] + measured["searcher_ms"]) / 1000
    print(f"model {2 * assumed.params / GB:.0f} GB, store {assumed.store_bytes / GB:.0f} GB, both in bf16")
    print(f"evaluation {assumed.evaluation_s:.2f} s on {assumed.tokens:,} tokens; constants {measured}\n")
    print("| | 64 GPUs | 512 GPUs |\n|---|---|---|")
    rows: dict[str, list[str]] = {}
    for gpus in (64, 512):
        nodes = gpus // assumed.per_node
        rate = measured["useful"] * gpus / assumed.evaluation_s
        search_s = assumed.evaluations / rate
        load_s = (2 * assumed.params + assumed.store_bytes) / assumed.disk
        wire = rate * (measured["sent_bytes"] + measured["answered_bytes"])
        tokens = nodes * 8 * (3 * assumed.tokens + 8 * assumed.tokens)
        for name, cell in {
            "evaluations a second, lag 4 for each GPU": f"{rate:.0f}",
            f"{assumed.evaluations:,} evaluations take": f"{search_s / 60:.1f} min",
            "proposals that the search is behind": f"{4 * gpus:,} ({100 * 4 * gpus / assumed.evaluations:.0f} %)",
            "the driver's core is busy": f"{100 * rate * driver_s:.0f} %",
            "requests and outcomes on the wire": f"{wire / 1e6:.2f} MB/s",
            "tokens in the object store, all nodes": f"{tokens / 1e6:.0f} MB, once",
            "model and store into each node's memory": f"{load_s:.0f} s at the start, from {nodes} nodes at once",
            "that, as a share of the whole": f"{100 * load_s / (load_s + search_s):.0f} %",
        }.items():
            rows.setdefault(name, []).append(cell)
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nthe driver is full at {1 / driver_s:,.0f} evaluations a second: ", end="")
    print(f"{assumed.evaluation_s / driver_s / measured['useful']:,.0f} GPUs at this evaluation's time")


if __name__ == "__main__":
    main()
