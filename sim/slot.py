"""One environment's place in a batch: its time limit and its window of the last To observations.

Runs in the main process or in a worker, without torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.complaints import not_finite
from flowsteer.sim.errors import EpisodeLostError
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import Array, Arrays, SingleEnv

OUTCOME = np.dtype(
    [
        ("reward_sum", np.float32),
        ("reward_max", np.float32),
        ("env_steps", np.int64),
        ("terminated", np.bool_),
        ("truncated", np.bool_),
        ("success", np.bool_),
    ]
)
"""What one chunk did in one environment; the words of `StepResult`."""

Outcomes = NDArray[np.void]
OutcomeRow = tuple[float, float, int, bool, bool, bool]
Causes = dict[int, str]
"""Environment -> why its episode is lost; only of those that have lost one."""


def window_arrays(
    spec: TaskSpec, num_envs: int, observation_steps: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape [B, To, ...] and dtype of each observation's window."""
    return {
        key: ((num_envs, observation_steps, *array.shape), np.dtype(array.dtype))
        for key, array in spec.observations.items()
    }


def shown_finite(windows: Iterable[Array]) -> NDArray[np.bool_]:
    """[n] bool: whether all numbers in observations [n, To, ...] are finite."""
    # One sum instead of a mask of every element: it is not finite if any of them is not.
    with np.errstate(invalid="ignore"):
        sums = [window.sum(axis=tuple(range(1, window.ndim))) for window in windows if window.dtype.kind == "f"]
        return np.isfinite(sum(sums, np.zeros(1)))


@final
class Slot:
    """One environment of `spec`'s task that writes its observations into `window` {key: [To, ...]}."""

    def __init__(self, env: SingleEnv, spec: TaskSpec, window: Mapping[str, Array]) -> None:
        self._env, self._spec = env, spec
        self._window = window
        self._observation_steps = len(next(iter(window.values())))
        self._steps = 0

    def start(self, seed: int) -> None:
        """Begin the episode of `seed`; its first observation fills the window."""
        observation = self._env.reset(seed)
        self._steps = 0
        for key, window in self._window.items():
            window[:] = observation[key]

    def run(self, actions: Array) -> tuple[OutcomeRow, str | None]:
        """Execute actions [Ta, Da] up to the episode's end.

        Returns:
            A row of `OUTCOME`, and why the episode is lost where it is. A reward or observation of the task that is
            not finite is left to be seen in the sum of the rewards and in the window.
        """
        recent: deque[Arrays] = deque(maxlen=self._observation_steps)
        rewards, steps, success, terminated, lost = [], 0, False, False, None
        while steps < len(actions) and not (terminated or self._out_of_time(steps)):
            steps += 1
            try:
                step = self._env.step(actions[steps - 1])
            except EpisodeLostError as error:
                lost = str(error)
                break
            rewards.append(step.reward)
            if not math.isfinite(step.reward):
                break
            recent.append(step.observation)
            success |= step.success
            terminated = step.terminated
        self._remember(recent)
        lost = lost or self._fault(rewards)
        largest = max(filter(math.isfinite, rewards), default=0.0)
        truncated = not terminated and self._out_of_time(steps)
        self._steps += steps
        kept = lost is None
        return (sum(rewards), largest, steps, terminated and kept, truncated and kept, success), lost

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _out_of_time(self, steps: int) -> bool:
        """Whether so many steps more use up the time limit."""
        return self._steps + steps >= self._spec.max_episode_steps

    def _fault(self, rewards: list[float]) -> str | None:
        shown = shown_finite(window[None] for window in self._window.values())
        return None if math.isfinite(sum(rewards)) and shown.all() else not_finite(self._spec.name)

    def _remember(self, recent: deque[Arrays]) -> None:
        if not recent:
            return
        for key, window in self._window.items():
            window[: -len(recent)] = window[len(recent) :]
            window[-len(recent) :] = [observation[key] for observation in recent]


def run_slots(slots: Mapping[int, Slot], actions: Mapping[int, Array]) -> tuple[list[OutcomeRow], Causes]:
    """Execute {environment: [Ta, Da]} one after the other; see `Slot.run`."""
    ran = {i: slots[i].run(chunk) for i, chunk in actions.items()}
    return [row for row, _ in ran.values()], {i: why for i, (_, why) in ran.items() if why is not None}
