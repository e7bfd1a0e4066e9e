"""The connection to a Ray cluster, with room for workers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from allocator.core.errors import UserError

_KNOCK_S = 10.0
_WAIT_S = 600.0
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}


@dataclass(frozen=True, slots=True)
class Demand:
    """What one worker takes of the node that it is on.

    Attributes:
        cpus: CPU threads.
        gpus: GPUs, or a share of one.
        resources: Resources that the cluster's nodes were given names for.
    """

    cpus: int = 1
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Return the options of the worker's actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.resources)}

    def room(self, node: Mapping[str, float]) -> int:
        """Return how many workers fit on a node of such resources."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        # shares of a GPU are summed in ten-thousandths by Ray, and a worker's is of one GPU
        fits = {kind: int(node.get(kind, 0.0) / amount + 1e-4) for kind, amount in needed.items() if amount}
        if 0 < self.gpus < 1:
            fits["GPU"] = int(1 / self.gpus + 1e-4) * int(node.get("GPU", 0.0))
        return min(fits.values())

    def __str__(self) -> str:
        gpus = [f"{self.gpus:g} GPU"] if self.gpus else []
        return ", ".join([f"{self.cpus} CPU", *gpus, *(f"{n:g} {kind}" for kind, n in self.resources.items())])


@contextlib.contextmanager
def connected(
    workers: int, demand: Demand, address: str | None, notify: Callable[[str], None] = lambda message: None
) -> Iterator[None]:
    """Hold a connection to a Ray cluster with room for a worker at least.

    A session that is open already is used, and stays open. Else a connection is made to ``address``, to the
    cluster of the environment, or to a local cluster that lives as long as the connection. A cluster that is neither
    local nor open may be waited for, until it has a node.

    Args:
        workers: How many shall work at most; ``notify`` hears where there is room for fewer.
        demand: What each takes.
        address: Of a running cluster.
        notify: Hears what a user should know.

    Raises:
        UserError: No cluster answers at ``address``, or no node of it has room for a worker.
    """
    owned = not ray.is_initialized()
    address = address or os.environ.get("RAY_ADDRESS")
    local = address is None and "RAY_JOB_ID" not in os.environ
    if owned and local:
        ray.init(address="local", num_cpus=workers * demand.cpus, include_dashboard=False, **_QUIET)
    elif owned:
        _connect(address)
    try:
        rooms = _rooms(demand)
        if not any(rooms) and owned and not local:
            notify(f"notice: no node has room for a worker ({demand}) yet; waiting {_WAIT_S / 60:.0f} minutes for one")
            end_s = time.monotonic() + _WAIT_S
            while not any(rooms := _rooms(demand)) and time.monotonic() < end_s:
                time.sleep(1.0)
        if not any(rooms):
            there = ray.cluster_resources()
            amounts = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", *demand.resources))
            raise UserError(
                f"workers: each needs {demand} on one node, and no node of the Ray cluster has that; it has {amounts} "
                "in all. Lower threads, worker.gpus or worker.resources, or start a node that has it"
            )
        if sum(rooms) < workers:
            notify(f"notice: the cluster has room for {sum(rooms)} of {workers} workers; more start as nodes join")
        yield
    finally:
        if owned:
            ray.shutdown()


def _rooms(demand: Demand) -> list[int]:
    """Return how many workers each node has room for."""
    return [demand.room(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _connect(address: str | None) -> None:
    try:
        if address is not None:
            _knock(address)
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shown = "the address of the environment" if address is None else address.rpartition("@")[2]
        raise UserError(
            f"address: no Ray cluster answers at {shown} ({reason}). Start one with 'ray start --head', "
            "or leave --address out for a local one"
        ) from None


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port: Ray itself would try for minutes, and write about it."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
