"""Where the environments of a batch live: in this process here, in worker processes in `flowsteer.sim.worker_pool`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import numpy as np

from flowsteer.sim.complaints import Tell, WarnOnce
from flowsteer.sim.slot import OUTCOME, Outcomes, Slot, run_slots, window_arrays
from flowsteer.sim.tasks.base import Array, Arrays, Task


class Pool(ABC):
    """B environments; `windows` {key: [B, To, ...]} always holds their last To observations."""

    windows: Arrays

    @abstractmethod
    def start(self, seeds: Mapping[int, int]) -> None:
        """Begin an episode in each environment named, {environment: seed}."""

    @abstractmethod
    def run(self, actions: Mapping[int, Array]) -> tuple[Outcomes, set[int]]:
        """Execute {environment: [Ta, Da]}; returns one `OUTCOME` per environment in order, and those that were lost."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; safe to call twice."""


@final
class LocalPool(Pool):
    """All environments in this process, one after the other: best where a step is cheaper than a message.

    Args:
        task, num_envs, observation_steps: B environments of which.
        tell: why episodes are lost, by default a warning once of each cause.
    """

    def __init__(self, task: Task, num_envs: int, observation_steps: int, tell: Tell | None = None) -> None:
        arrays = window_arrays(task.spec, num_envs, observation_steps)
        self._tell = tell or WarnOnce()
        self.windows = {key: np.zeros(shape, dtype) for key, (shape, dtype) in arrays.items()}
        self._slots = {
            i: Slot(task.make(), task.spec, {key: window[i] for key, window in self.windows.items()})
            for i in range(num_envs)
        }

    def start(self, seeds: Mapping[int, int]) -> None:
        """See `Pool`."""
        for i, seed in seeds.items():
            self._slots[i].start(seed)

    def run(self, actions: Mapping[int, Array]) -> tuple[Outcomes, set[int]]:
        """See `Pool`."""
        rows, causes = run_slots(self._slots, actions)
        self._tell(causes.values())
        return np.array(rows, dtype=OUTCOME), set(causes)

    def close(self) -> None:
        """See `Pool`."""
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
