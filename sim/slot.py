"""One environment's place in a batch: its time limit and its window of the last To observations.

Runs in the main process or in a worker, without torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

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


def window_arrays(
    spec: TaskSpec, num_envs: int, observation_steps: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape [B, To, ...] and dtype of each observation's window."""
    return {
        key: ((num_envs, observation_steps, *array.shape), np.dtype(array.dtype))
        for key, array in spec.observations.items()
    }


@final
class Slot:
    """One environment that writes its observations into `window` {key: [To, ...]}."""

    def __init__(self, env: SingleEnv, max_episode_steps: int, window: Mapping[str, Array]) -> None:
        self._env = env
        self._max_episode_steps = max_episode_steps
        self._window = window
        self._observation_steps = len(next(iter(window.values())))
        self._steps = 0

    def start(self, seed: int) -> None:
        """Begin the episode of `seed`; its first observation fills the window."""
        observation = self._env.reset(seed)
        self._steps = 0
        for key, window in self._window.items():
            window[:] = observation[key]

    def run(self, actions: Array) -> OutcomeRow:
        """Execute actions [Ta, Da] up to the episode's end; one row of `OUTCOME`."""
        recent: deque[Arrays] = deque(maxlen=self._observation_steps)
        rewards, success, terminated, truncated = [], False, False, False
        for action in actions:
            step = self._env.step(action)
            recent.append(step.observation)
            rewards.append(step.reward)
            success |= step.success
            terminated = step.terminated
            truncated = not terminated and self._steps + len(rewards) >= self._max_episode_steps
            if terminated or truncated:
                break
        self._steps += len(rewards)
        self._remember(recent)
        return sum(rewards), max(rewards), len(rewards), terminated, truncated, success

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _remember(self, recent: deque[Arrays]) -> None:
        for key, window in self._window.items():
            window[: -len(recent)] = window[len(recent) :]
            window[-len(recent) :] = [observation[key] for observation in recent]
