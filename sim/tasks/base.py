"""What a task is: one environment in plain numpy, and how to make it.

A new task is one file with one final `Task` class and one line in `TASKS` of `configs/groups.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.policies.spec import configurable
from flowsteer.sim.spec import TaskSpec

Array = NDArray[Any]
Arrays = dict[str, Array]


@final
@dataclass(frozen=True)
class Step:
    """What one env step gave: observation, reward, the end by the task's own rule, and success at this step.

    The time limit (`TaskSpec.max_episode_steps`) is the back end's business and never appears here.
    """

    observation: Arrays
    reward: float
    terminated: bool
    success: bool


class DatasetKey(NamedTuple):
    """Where the public demonstrations keep an observation: `read(array[key])`, or the array as it is."""

    key: str
    read: Callable[[Array], Array] | None = None


class SingleEnv(ABC):
    """One environment. Made, stepped and closed inside one process; it may hold what cannot be pickled."""

    @abstractmethod
    def reset(self, seed: int) -> Arrays:
        """Start the episode that `seed` alone determines; returns the arrays named and shaped as in the task's spec."""

    @abstractmethod
    def step(self, action: Array) -> Step:
        """Execute one action [Da] in physical units (the back end has clipped it to the task's limits).

        Raises:
            EpisodeLostError: this episode cannot go on.
        """

    @abstractmethod
    def render(self) -> NDArray[np.uint8]:
        """The scene now, [H, W, 3]; both sides even, for video."""

    @abstractmethod
    def project(self, actions: Array) -> NDArray[np.float64] | None:
        """Where actions [Tp, Da] would bring the robot, as [Tp, 2] pixels (x right, y down) of `render()`.

        None where the task cannot draw them.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything; safe to call twice."""


@configurable
class Task(ABC):
    """How to make an environment, and what it offers.

    A task is small and picklable: workers receive it and call `make` themselves. Concrete tasks are final, with a
    typed constructor without `**kwargs`, since configs are generated from its signature.
    """

    spec: TaskSpec
    heavy: ClassVar[bool]
    """True where one step takes longer than a message between processes: such tasks run in worker processes."""
    dataset_keys: Mapping[str, DatasetKey]
    """Observation key -> its place in the public demonstrations; only those that are not under their own name."""
    training_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the task to learn in, where the reward that evaluation reports is not one to learn from."""
    mirror: Callable[[Arrays], Arrays] | None = None
    """Where the world has a symmetry: arrays [N, ...] of observations and "action" -> those of the mirrored episode."""
    hindsight: Callable[[Arrays, NDArray[np.int64]], Arrays] | None = None
    """Arrays [N, ...], episode ends [E] -> those of episodes for which the goal lay where they ended."""

    @abstractmethod
    def make(self) -> SingleEnv:
        """A new environment.

        Raises:
            SimError: if a package is missing, naming the extra to install.
        """
