"""This process's connection to Ray, which all of its pools share."""

from __future__ import annotations

import os
import socket
import time
from typing import Any, final

from flowsteer.sim.cores import usable_cores
from flowsteer.sim.environ import environment
from flowsteer.sim.errors import SimError, optional_module

KNOCK_TIMEOUT_S = 5.0
RETURN_TIMEOUT_S = 10.0


@final
class Connection:
    """Opened by the first pool and closed with the last one; a connection that was there before stays open.

    RAY_ADDRESS names a cluster that runs already ("auto": the one that `ray start` made on this machine). Without it,
    Ray is started on this machine, without a dashboard and without usage reports.
    """

    def __init__(self) -> None:
        self._pools = 0
        self._ours = False
        self._local = False

    @property
    def cpus_per_worker(self) -> int:
        """What a worker reserves: nothing in a Ray of our own, whose cores one process may well share out twice."""
        return 0 if self._local else 1

    def open(self) -> Any:
        """The module `ray`, connected; each call is answered by one of `close`.

        Raises:
            SimError: the package is missing, or no cluster answers at RAY_ADDRESS.
        """
        ray = optional_module("ray", "ray")
        if not ray.is_initialized():
            self._local = "RAY_ADDRESS" not in os.environ
            _start(ray, self._local)
            self._ours = True
        self._pools += 1
        return ray

    def free_cpus(self, wanted: int) -> int:
        """CPUs that nobody has reserved; waits for as many as wanted, as Ray takes a while to free those of a pool."""
        ray, end = optional_module("ray", "ray"), time.monotonic() + RETURN_TIMEOUT_S
        while (free := int(ray.available_resources().get("CPU", 0))) < wanted and time.monotonic() < end:
            time.sleep(0.2)
        return free

    def close(self) -> None:
        """One pool less; the last one ends what the first one began."""
        self._pools -= 1
        if self._pools == 0 and self._ours:
            optional_module("ray", "ray").shutdown()
            self._ours = self._local = False


def _start(ray: Any, local: bool) -> None:
    options = {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False} if local else {}
    try:
        if not local:
            _knock(os.environ["RAY_ADDRESS"])
        with environment({"RAY_USAGE_STATS_ENABLED": "0"}):
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (OSError, RuntimeError, ValueError) as error:
        where = "on this machine" if local else f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise SimError(f"Ray cannot be reached {where}: {' '.join(str(error).split())}") from error


def _knock(address: str) -> None:
    """Fail at once where nobody listens; Ray itself goes on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_TIMEOUT_S).close()


CONNECTION = Connection()
