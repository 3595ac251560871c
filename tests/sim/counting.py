"""A task whose every number can be computed by hand, with actions that misbehave on request."""

import os
import time
from typing import ClassVar

import numpy as np

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.errors import EpisodeLostError, SimError
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import SingleEnv, Step, Task

EXIT, HANG, RAISE = 666.0, 777.0, 888.0
LOSE, NAN_REWARD, NAN_OBSERVATION = -666.0, -777.0, -888.0


class CountingEnv(SingleEnv):
    def __init__(self, task):
        self._task = task

    def reset(self, seed):
        self._seed, self._t, self._last = seed, 0, 0.0
        if seed in self._task.deadly_seeds:
            os._exit(4)
        return self._observation()

    def step(self, action):
        (self._last,) = action.tolist()
        self._t += 1
        if self._last == EXIT:
            os._exit(3)
        if self._last == HANG:
            time.sleep(600)
        if self._last == RAISE:
            raise ValueError("the arm\ncame off")
        if self._last == LOSE:
            raise EpisodeLostError("counting: the beads fell off: pick them up")
        reward = np.nan if self._last == NAN_REWARD else self._last
        return Step(self._observation(), reward, self._t == self._length(), self._last > 500)

    def render(self):
        if not self._task.visible:
            raise SimError("cannot render: install libegl1")
        picture = np.zeros((64, 96, 3), dtype=np.uint8)
        picture[:, : self._t] = 200
        return picture

    def project(self, actions):
        return np.concatenate([actions, actions], axis=1).astype(np.float64)

    def close(self):
        pass

    def _length(self):
        return self._task.lengths.get(self._seed, 10**9)

    def _observation(self):
        last = np.nan if self._last == NAN_OBSERVATION else self._last
        return {
            "count": np.array([self._seed, self._t, last], dtype=np.float32),
            "picture": np.full((2, 2, 3), self._t, dtype=np.uint8),
        }


class Counting(Task):
    """Observes seed, step and last action; the reward is the action; success is an action above 500.

    Args:
        lengths: seed -> the step at which the task's own rule ends the episode.
        limit: the time limit.
        deadly_seeds: resetting to these ends the process.
        visible: whether it can be rendered.
    """

    heavy: ClassVar[bool] = False
    dataset_keys: ClassVar[dict] = {}

    def __init__(self, lengths=None, limit=20, deadly_seeds=(), visible=True):
        self.lengths, self.deadly_seeds, self.visible = dict(lengths or {}), tuple(deadly_seeds), visible
        self.spec = TaskSpec(
            name="counting",
            observations={"count": ArraySpec((3,)), "picture": ArraySpec((2, 2, 3), "uint8")},
            action_dim=1,
            action_low=(-1000.0,),
            action_high=(1000.0,),
            control_hz=10.0,
            max_episode_steps=limit,
        )

    def make(self):
        return CountingEnv(self)
