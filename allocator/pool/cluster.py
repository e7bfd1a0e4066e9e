"""The connection to a Ray cluster that has room for workers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from allocator.core.errors import UserError
from allocator.core.notify import Notify, silent

_CONNECT_S = 10.0
_WAIT_S = 600.0
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}


@dataclass(frozen=True, slots=True)
class Demand:
    """The resources that one worker takes on its node.

    Attributes:
        cpus: CPU threads.
        gpus: GPUs, or a share of one.
        resources: Amounts of the custom resources of the cluster's nodes, by name.
    """

    cpus: int = 1
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    def to_options(self) -> dict[str, Any]:
        """Return the worker's options for Ray."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.resources)}

    def count_room(self, node: Mapping[str, float]) -> int:
        """Count the workers that fit on a node with the given resources."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        # Ray sums shares of a GPU in ten-thousandths; the share of a worker is of a single GPU
        fits = {kind: int(node.get(kind, 0.0) / amount + 1e-4) for kind, amount in needed.items() if amount}
        if 0 < self.gpus < 1:
            fits["GPU"] = int(1 / self.gpus + 1e-4) * int(node.get("GPU", 0.0))
        return min(fits.values())

    def __str__(self) -> str:
        gpus = [f"{self.gpus:g} GPU"] if self.gpus else []
        return ", ".join([f"{self.cpus} CPU", *gpus, *(f"{n:g} {kind}" for kind, n in self.resources.items())])


@contextlib.contextmanager
def connected(workers: int, demand: Demand, address: str | None, notify: Notify = silent) -> Iterator[None]:
    """Hold a connection to a Ray cluster that has room for at least one worker.

    A session that is already open is used, and stays open. Otherwise the connection is made to ``address``, to the
    cluster of the environment, or to a local cluster that ends with the connection. If the cluster is neither local nor
    already open, this waits until one of its nodes has room.

    Args:
        workers: The number of workers. The user is notified where there is room for fewer.
        demand: The resources of one worker.
        address: The address of a running cluster.
        notify: Called with messages for the user.

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
        rooms = _count_rooms(demand)
        if not any(rooms) and owned and not local:
            notify(f"notice: no node has room for a worker ({demand}) yet; waiting {_WAIT_S / 60:.0f} minutes for one")
            end_s = time.monotonic() + _WAIT_S
            while not any(rooms := _count_rooms(demand)) and time.monotonic() < end_s:
                time.sleep(1.0)
        if not any(rooms):
            resources = ray.cluster_resources()
            amounts = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU", *demand.resources))
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


def _count_rooms(demand: Demand) -> list[int]:
    """Count the workers that each node has room for."""
    return [demand.count_room(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _connect(address: str | None) -> None:
    try:
        if address is not None:
            _check_port(address)
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        target = "the address of the environment" if address is None else address.rpartition("@")[2]
        raise UserError(
            f"address: no Ray cluster answers at {target} ({reason}). Start one with 'ray start --head', "
            "or leave --address out for a local one"
        ) from None


def _check_port(address: str) -> None:
    """Raise OSError where nothing listens at host:port. Ray itself would try for minutes, and write to the log."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
