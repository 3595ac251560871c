"""Environments dealt over Ray actors, on this machine or on the many of a cluster.

One call asks an actor to execute a whole chunk in all of its environments; its arrays travel through Ray's object
store, once each way. An actor that dies, whose machine is lost or that stops answering costs the episodes that it ran,
never the run: `run` tells which were lost, and the next `start` puts a new actor in its place. Every machine of the
cluster needs the same flowsteer and the same simulator installed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, final

import numpy as np

from flowsteer.sim import ray_connection
from flowsteer.sim.complaints import WarnOnce
from flowsteer.sim.dealing import CLOSE_TIMEOUT_S, START_TIMEOUT_S, Dealing
from flowsteer.sim.errors import SimError
from flowsteer.sim.pool import LocalPool, Pool
from flowsteer.sim.rollout_pool import RolloutPool
from flowsteer.sim.slot import Outcomes, window_arrays
from flowsteer.sim.tasks.base import Array, Arrays, Task
from flowsteer.sim.tasks.mujoco_task import MujocoTask


@final
class Crew:
    """The inside of an actor: some environments, counted from 0. Nothing here needs torch."""

    def make(self, task: Task, num_envs: int, observation_steps: int) -> str:
        """Make the environments; returns where they live."""
        self._causes: list[str] = []
        tell = self._causes.extend
        if isinstance(task, MujocoTask):
            self._pool: Pool = RolloutPool(task, num_envs, observation_steps, threads=1, tell=tell)
        else:
            self._pool = LocalPool(task, num_envs, observation_steps, tell)
        return f"process {os.getpid()} on {socket.gethostname()}"

    def start(self, seeds: Mapping[int, int]) -> Arrays:
        """Begin the episodes {environment: seed}; returns their windows."""
        self._pool.start(seeds)
        return self._seen(list(seeds))

    def run(self, envs: list[int], chunks: Array) -> tuple[Outcomes, set[int], list[str], Arrays]:
        """Execute chunks [n, Ta, Da] in n environments: outcomes, those lost, why, and the windows of all n."""
        self._causes.clear()
        # What comes out of the object store is read-only, and environments may scale their action in place.
        outcomes, lost = self._pool.run(dict(zip(envs, chunks.copy(), strict=True)))
        return outcomes, lost, self._causes, self._seen(envs)

    def close(self) -> None:
        """Close every environment."""
        self._pool.close()

    def _seen(self, envs: list[int]) -> Arrays:
        return {key: window[envs] for key, window in self._pool.windows.items()}


@final
class RayPool(Pool):
    """B environments dealt over Ray actors of one CPU each; see `ray_connection.Connection` for where Ray runs.

    Args:
        task: sent to every actor. MuJoCo tasks are stepped as one batch there, others one after the other.
        num_envs: B.
        observation_steps: To.
        workers: actors, by default one per CPU of the cluster; no more than B are started.
        timeout_s: an actor that takes longer over one chunk or reset is killed and counts as dead.

    Raises:
        SimError: Ray is missing or cannot be reached, the cluster is too small or too busy, or the environments
            cannot be made.
    """

    def __init__(
        self,
        task: Task,
        num_envs: int,
        observation_steps: int,
        workers: int | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        self._task, self._observation_steps, self._timeout_s = task, observation_steps, timeout_s
        self._tell = WarnOnce()
        arrays = window_arrays(task.spec, num_envs, observation_steps)
        self.windows = {key: np.zeros(shape, dtype) for key, (shape, dtype) in arrays.items()}
        self._actors: dict[int, Any] = {}
        self._places: dict[int, str] = {}
        self._connection = ray_connection.CONNECTION
        self._ray = self._connection.open()
        self._open = True
        try:
            self._workers = min(num_envs, self._room(workers))
            remedy = "see `ray status`, or try sim.backend=gym"
            worker = f"{task.spec.name}: the Ray worker"
            self._dealing = Dealing(num_envs, self._workers, worker, remedy, self.close)
            self._hire(range(self._workers))
            if not self._actors:
                raise SimError(f"{task.spec.name}: Ray has started none of {self._workers} workers; see `ray status`")
        except BaseException:
            self.close()
            raise

    def start(self, seeds: Mapping[int, int]) -> None:
        """See `Pool`. The episodes of an actor that dies here are lost, which the next `run` tells."""
        parts = self._dealing.parts(seeds)
        self._hire(w for w in parts if w not in self._actors)
        requests = {w: ({i // self._workers: seeds[i] for i in part},) for w, part in parts.items()}
        for w, windows in self._ask("start", requests, self._timeout_s).items():
            self._show(parts[w], windows)

    def run(self, actions: Mapping[int, Array]) -> tuple[Outcomes, set[int]]:
        """See `Pool`."""
        parts = self._dealing.parts(actions)
        requests = {
            w: ([i // self._workers for i in part], np.stack([actions[i] for i in part])) for w, part in parts.items()
        }
        answers = self._ask("run", requests, self._timeout_s)
        for w, (_, _, causes, windows) in answers.items():
            self._tell(causes)
            self._show(parts[w], windows)
        indices = self._dealing.indices
        told = {w: (rows, {indices[w][i] for i in gone}) for w, (rows, gone, _, _) in answers.items()}
        return self._dealing.collect(actions, told)

    def close(self) -> None:
        """See `Pool`. Ray itself goes on where it ran before, or where another pool needs it."""
        if not self._open:
            return
        self._open = False
        closing = [actor.close.remote() for actor in self._actors.values()]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._connection.close()

    def _room(self, workers: int | None) -> int:
        """How many workers to start."""
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        wanted = workers or max(cpus, 1)
        if not self._connection.cpus_per_worker:
            return wanted
        free = self._connection.free_cpus(min(wanted, cpus))
        if free < (workers or 1):
            raise SimError(
                f"the Ray cluster has {cpus} CPUs, {free} of them free, too few for {workers or 1} workers: "
                "choose fewer: sim.workers="
            )
        return workers or free

    def _show(self, envs: list[int], windows: Arrays) -> None:
        for key, rows in windows.items():
            self.windows[key][envs] = rows

    def _hire(self, numbers: Iterable[int]) -> None:
        """Start the workers named, all at once."""
        hired = set(numbers)
        actor = self._ray.remote(Crew).options(num_cpus=self._connection.cpus_per_worker)
        self._actors |= {w: actor.remote() for w in hired}
        self._places |= dict.fromkeys(hired, "not placed")
        requests = {w: (self._task, len(self._dealing.indices[w]), self._observation_steps) for w in hired}
        self._places |= self._ask("make", requests, START_TIMEOUT_S)

    def _ask(self, method: str, requests: Mapping[int, tuple[Any, ...]], timeout_s: float) -> dict[int, Any]:
        """The answers of the workers that gave one."""
        asked = self._actors.keys() & requests
        refs = {w: getattr(self._actors[w], method).remote(*requests[w]) for w in asked}
        if not refs:
            return {}
        ready, _ = self._ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
        answers = {}
        for w, ref in refs.items():
            if ref not in ready:
                self._bury(w, f"did not answer within {timeout_s:g} s")
                continue
            try:
                answers[w] = self._ray.get(ref, timeout=self._timeout_s)
            except self._ray.exceptions.RayTaskError as error:
                self._fail(error.cause)
            except self._ray.exceptions.RayError as error:
                self._bury(w, f"died ({type(error).__name__})")
        return answers

    def _fail(self, cause: Exception) -> None:
        self.close()
        # Ray's own errors carry a traceback, whose last line says it; the others are an environment's.
        lines = (
            str(cause).strip().splitlines()[-1:] if isinstance(cause, self._ray.exceptions.RayError) else [str(cause)]
        )
        told = f"{type(cause).__name__}: {' '.join(' '.join(lines).split())}"
        raise SimError(f"{self._task.spec.name}: an environment failed in its worker: {told}") from cause

    def _bury(self, w: int, reason: str) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors.pop(w))
        self._dealing.bury(w, f"{reason}, {self._places.pop(w)}")
