"""Environments in worker processes: for tasks whose step costs more than a message between processes.

One message asks a worker to execute a whole chunk in all of its environments; observations come back through shared
memory, the few numbers of the outcome through the pipe. A worker that dies or stops answering costs the episodes
that it ran, never the run: `run` tells which were lost, and the next `start` puts a new process in its place.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ctypes import c_byte
from multiprocessing.connection import wait
from typing import Any, final

from flowsteer.sim.complaints import WarnOnce
from flowsteer.sim.cores import SINGLE_THREADED
from flowsteer.sim.dealing import CLOSE_TIMEOUT_S, START_TIMEOUT_S, Dealing
from flowsteer.sim.environ import environment
from flowsteer.sim.errors import SimError
from flowsteer.sim.pool import Pool
from flowsteer.sim.slot import Outcomes, window_arrays
from flowsteer.sim.tasks.base import Array, Task
from flowsteer.sim.worker_process import SharedArrays, serve, views

# A fresh interpreter each: the fork of a process that has threads or an OpenGL context may hang.
_CONTEXT = multiprocessing.get_context("spawn")


@final
class _Worker:
    """A running process and our end of its pipe."""

    def __init__(self, task: Task, indices: tuple[int, ...], shared: SharedArrays) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=serve, args=(theirs, task, indices, shared), daemon=True)
        with environment(SINGLE_THREADED):
            self.process.start()
        theirs.close()

    def send(self, method: str, argument: Any) -> None:
        """Ask; that a worker is gone is found out when its answer is awaited."""
        with suppress(OSError):
            self.pipe.send((method, argument))

    def receive(self) -> tuple[Any, str | None] | None:
        """The answer, or None where the worker died."""
        try:
            answer: tuple[Any, str | None] = self.pipe.recv()
        except (EOFError, OSError):
            return None
        return answer

    def hang_up(self) -> None:
        """Ask the process to end."""
        self.pipe.close()

    def end(self, patience_s: float) -> str:
        """Wait for the end of the process, kill it after `patience_s`; returns how it ended."""
        self.process.join(patience_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        description = f"process {self.process.pid}, exit code {self.process.exitcode}"
        self.process.close()
        return description


@final
class WorkerPool(Pool):
    """B environments dealt over worker processes.

    Args:
        task: sent to every worker.
        num_envs: B.
        observation_steps: To.
        workers: processes; no more than B are started.
        timeout_s: a worker that takes longer over one chunk or reset is killed and counts as dead.
    """

    def __init__(self, task: Task, num_envs: int, observation_steps: int, workers: int, timeout_s: float) -> None:
        self._task = task
        self._timeout_s = timeout_s
        self._tell = WarnOnce()
        self._shared = {
            key: (_CONTEXT.RawArray(c_byte, math.prod(shape) * dtype.itemsize), shape, dtype)
            for key, (shape, dtype) in window_arrays(task.spec, num_envs, observation_steps).items()
        }
        self.windows = views(self._shared)
        remedy = "the simulator cannot run here; try with workers=0"
        self._dealing = Dealing(num_envs, workers, f"{task.spec.name}: the worker", remedy, self.close)
        self._workers: dict[int, _Worker] = {}
        self._hire(range(len(self._dealing.indices)))

    def start(self, seeds: Mapping[int, int]) -> None:
        """See `Pool`. The episodes of a worker that dies here are lost, which the next `run` tells."""
        parts = self._dealing.parts(seeds)
        self._hire(w for w in parts if w not in self._workers)
        self._ask("start", {w: {i: seeds[i] for i in part} for w, part in parts.items()})

    def run(self, actions: Mapping[int, Array]) -> tuple[Outcomes, set[int]]:
        """See `Pool`."""
        parts = self._dealing.parts(actions)
        answers = self._ask("run", {w: {i: actions[i] for i in part} for w, part in parts.items()})
        for _, causes in answers.values():
            self._tell(causes.values())
        return self._dealing.collect(actions, {w: (rows, set(causes)) for w, (rows, causes) in answers.items()})

    def close(self) -> None:
        """See `Pool`."""
        for worker in self._workers.values():
            worker.hang_up()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for worker in self._workers.values():
            worker.end(patience_s=max(0.0, deadline - time.monotonic()))
        self._workers.clear()

    def _hire(self, numbers: Iterable[int]) -> None:
        """Start the workers named, all at once."""
        hired = set(numbers)
        self._workers |= {w: _Worker(self._task, self._dealing.indices[w], self._shared) for w in hired}
        self._gather(hired, START_TIMEOUT_S)

    def _ask(self, method: str, parts: Mapping[int, Any]) -> dict[int, Any]:
        """The answers of the workers that gave one."""
        asked = self._workers.keys() & parts
        for w in asked:
            self._workers[w].send(method, parts[w])
        return self._gather(asked, self._timeout_s)

    def _gather(self, waiting: set[int], timeout_s: float) -> dict[int, Any]:
        deadline = time.monotonic() + timeout_s
        answers = {}
        while waiting:
            ready = wait([self._workers[w].pipe for w in waiting], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for w in waiting:
                    self._bury(w, f"did not answer within {timeout_s:g} s", patience_s=0.0)
                break
            for w in {w for w in waiting if self._workers[w].pipe in ready}:
                waiting = waiting - {w}
                answer = self._workers[w].receive()
                if answer is None:
                    self._bury(w, "died", patience_s=2.0)
                else:
                    answers[w] = self._result(answer)
        return answers

    def _result(self, answer: tuple[Any, str | None]) -> Any:
        result, error = answer
        if error is not None:
            self.close()
            raise SimError(f"{self._task.spec.name}: an environment failed in its worker: {error}")
        return result

    def _bury(self, w: int, reason: str, patience_s: float) -> None:
        worker = self._workers.pop(w)
        worker.hang_up()
        self._dealing.bury(w, f"{reason} ({worker.end(patience_s)})")
