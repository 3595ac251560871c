"""The inside of a worker process: some environments, and requests answered until the pipe closes. No torch here."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, final

import numpy as np

from flowsteer.sim.slot import Causes, OutcomeRow, Slot, run_slots
from flowsteer.sim.tasks.base import Array, Arrays, Task

SharedArrays = Mapping[str, tuple[Any, tuple[int, ...], "np.dtype[Any]"]]
"""Key -> raw shared memory, shape and dtype of the array in it."""


def views(shared: SharedArrays) -> Arrays:
    """The arrays in the shared memory, without a copy."""
    return {key: np.frombuffer(memory, dtype).reshape(shape) for key, (memory, shape, dtype) in shared.items()}


@final
class Crew:
    """The environments of one worker."""

    def __init__(self, task: Task, indices: Sequence[int], windows: Arrays) -> None:
        self._slots = {
            i: Slot(task.make(), task.spec, {key: array[i] for key, array in windows.items()}) for i in indices
        }

    def start(self, seeds: Mapping[int, int]) -> None:
        """Begin the episodes {environment: seed}."""
        for i, seed in seeds.items():
            self._slots[i].start(seed)

    def run(self, chunks: Mapping[int, Array]) -> tuple[list[OutcomeRow], Causes]:
        """Execute {environment: [Ta, Da]}."""
        return run_slots(self._slots, chunks)

    def close(self) -> None:
        """Close every environment."""
        for slot in self._slots.values():
            slot.close()


def serve(pipe: Connection, task: Task, indices: Sequence[int], shared: SharedArrays) -> None:
    """A worker's life. Every answer is (result, error text); the first one says whether the environments could be made.

    Args:
        pipe: of the main process; requests are (name of a method of `Crew`, its argument).
        task: what to make.
        indices: which environments of the batch live here.
        shared: the observation windows of the whole batch.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle; it will close the pipe.
    try:
        crew = Crew(task, indices, views(shared))
    except Exception as error:
        pipe.send((None, _one_line(error)))
        return
    try:
        pipe.send((None, None))
        while True:
            method, argument = pipe.recv()
            pipe.send(_answer(crew, method, argument))
    except (EOFError, OSError):  # The main process has closed the pipe or is gone.
        crew.close()


def _answer(crew: Crew, method: str, argument: Any) -> tuple[Any, str | None]:
    try:
        return getattr(crew, method)(argument), None
    except Exception as error:
        return None, _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
