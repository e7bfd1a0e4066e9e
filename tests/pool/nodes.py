"""A search on a cluster whose second node joins in the middle, and is lost again: run by test_nodes.py.

Prints what happened as one JSON line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import allocator
from allocator.pool import dispatch as ray_pool

pools: list[ray_pool.RayPool] = []


class Watched(ray_pool.RayPool):
    def __init__(self, *arguments: object, **more: object) -> None:
        pools.append(self)
        super().__init__(*arguments, **more)


ray_pool.RayPool = Watched


class Operator:
    """Adds a node when the search has begun, and kills it when workers there have done some work."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._node, self._phase, self._steps = cluster, None, "", 0
        self.said: list[str] = []
        self.alive: list[int] = []

    def start_phase(self, name: str, total: int | None = None) -> None:
        self._phase = name

    def notify(self, message: str) -> None:
        self.said.append(message)

    def advance(self, done: int, note: str = "") -> None:
        if self._phase != "search":
            return
        self.alive.append(pools[0].alive)
        if self._node is None:
            self._node = self._cluster.add_node(num_cpus=2)
        elif self._steps < 4 and self.alive[-1] < 3:
            time.sleep(0.5)
        elif self._steps < 4:
            self._steps += 1
            if self._steps == 4:
                self._cluster.remove_node(self._node, allow_graceful=False)
        elif self.alive[-1] > 1:
            time.sleep(0.5)  # or the search is over before Ray tells of it


def main(folder: Path, model: str, text: str, settings: list[str]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    operator = Operator(cluster)
    try:
        allocator.search(
            model, text=text, workers=3, name="nodes", runs_dir=folder, settings=settings, reporter=operator
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"said": operator.said, "alive": operator.alive}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
