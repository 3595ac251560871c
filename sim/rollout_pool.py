"""MuJoCo worlds on CPU threads: a whole chunk of all worlds is one call of `mujoco.rollout`.

A chunk is open loop, so every world is stepped to its end in C++; where an episode ended inside the chunk is found
afterwards, and what follows is masked. Dimension letters: n worlds that run, Ta control steps, To observed steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.chunk import judge_chunk, sane
from flowsteer.sim.cores import usable_cores
from flowsteer.sim.errors import optional_module
from flowsteer.sim.pool import Pool
from flowsteer.sim.slot import OUTCOME, Outcomes, window_arrays
from flowsteer.sim.tasks.base import Array, Arrays
from flowsteer.sim.tasks.mujoco_task import MujocoTask, State
from flowsteer.sim.tasks.randomization import Randomization


@final
class RolloutPool(Pool):
    """`num_envs` worlds of `task` on `threads` threads (one per usable core when not given).

    A world whose state stops being finite is lost: its episode counts for nothing, the others go on.

    Attributes:
        states: [B, ...] of all worlds now, as `mujoco.rollout` lays them out: time, qpos, qvel, actuator states.
    """

    def __init__(self, task: MujocoTask, num_envs: int, observation_steps: int, threads: int | None = None) -> None:
        self._task, self._observation_steps = task, observation_steps
        self._mujoco, rollout = optional_module("mujoco", "mujoco"), optional_module("mujoco.rollout", "mujoco")
        self._model = task.model()
        threads = min(num_envs, threads or usable_cores())
        self._data = [self._mujoco.MjData(self._model) for _ in range(threads)]
        self._randomization = Randomization(self._model, task.randomize)
        self._models = [copy(self._model) for _ in range(num_envs)] if task.randomize else []
        """A world's own; none where all worlds have the same."""
        self._rollout = rollout.Rollout(nthread=threads)
        size = self._mujoco.mj_stateSize(self._model, self._mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self.states = np.zeros((num_envs, size))
        self._sensors = np.zeros((num_envs, self._model.nsensordata))
        self._steps = np.zeros(num_envs, dtype=np.int64)
        shapes = window_arrays(task.spec, num_envs, observation_steps)
        self.windows: Arrays = {key: np.zeros(shape, dtype) for key, (shape, dtype) in shapes.items()}

    def start(self, seeds: Mapping[int, int]) -> None:
        """See `Pool`."""
        if not seeds:
            return
        worlds = np.fromiter(seeds, dtype=np.int64)
        qpos, qvel = self._task.initial(np, self._task.draws(seeds.values()))
        self._steps[worlds] = 0
        for i in seeds if self._models else ():
            self._randomization.apply(self._models[i], self._data[0], seeds[i])
        self.states[worlds] = 0
        self.states[worlds, 1 : 1 + self._model.nq + self._model.nv] = np.concatenate([qpos, qvel], axis=1)
        if self._model.nsensordata:
            self._sensors[worlds] = [self._sensed(i) for i in seeds]
        observed = self._task.observe(np, self._state(self.states[worlds], self._sensors[worlds]))
        for key, window in self.windows.items():
            window[worlds] = observed[key][:, None]

    def run(self, actions: Mapping[int, Array]) -> tuple[Outcomes, set[int]]:
        """See `Pool`."""
        worlds = np.fromiter(actions, dtype=np.int64)
        if not len(worlds):
            return np.zeros(0, dtype=OUTCOME), set()
        chunks = np.stack(list(actions.values()))
        states, sensors = self._simulate(worlds, chunks)
        before, after = self._state(states[:, :-1], sensors[:, :-1]), self._state(states[:, 1:], sensors[:, 1:])
        steps_left = self._task.spec.max_episode_steps - self._steps[worlds]
        judged = judge_chunk(np, self._task, before, chunks, after, steps_left, sane(np, after))
        last = judged.env_steps
        self._remember(worlds, after, last)
        rows = np.arange(len(worlds))
        self.states[worlds], self._sensors[worlds] = states[rows, last], sensors[rows, last]
        self._steps[worlds] += last
        outcomes = np.zeros(len(worlds), dtype=OUTCOME)
        for name in OUTCOME.names or ():
            outcomes[name] = getattr(judged, name)
        return outcomes, set(worlds[judged.lost].tolist())

    def close(self) -> None:
        """See `Pool`."""
        self._rollout.close()

    def _simulate(self, worlds: NDArray[np.int64], chunks: Array) -> tuple[Array, Array]:
        """States [n, 1 + Ta, ...] and sensors [n, 1 + Ta, ...] before the chunk and after each control step."""
        skip = self._task.frame_skip
        control = np.repeat(np.asarray(self._task.control(np, chunks), np.float64), skip, axis=1)
        starts = self.states[worlds]
        # Rollout has its own arrays made and returns every physics step; only the last of each control step counts.
        models = [self._models[i] for i in worlds] if self._models else self._model
        states, sensors = self._rollout.rollout(models, self._data, starts, control)
        return (
            np.concatenate([starts[:, None], states[:, skip - 1 :: skip]], axis=1),
            np.concatenate([self._sensors[worlds][:, None], sensors[:, skip - 1 :: skip]], axis=1),
        )

    def _remember(self, worlds: NDArray[np.int64], after: State, last: NDArray[np.int64]) -> None:
        """Append the observations of the executed steps to the windows."""
        recent = last[:, None] + np.arange(self._observation_steps)
        for key, new in self._task.observe(np, after).items():
            seen = np.concatenate([self.windows[key][worlds], new], axis=1)
            self.windows[key][worlds] = np.take_along_axis(
                seen, recent.reshape(*recent.shape, *(1,) * (seen.ndim - 2)), axis=1
            )

    def _state(self, states: Array, sensors: Array) -> State:
        nq, nv = self._model.nq, self._model.nv
        return State(states[..., 1 : 1 + nq], states[..., 1 + nq : 1 + nq + nv], sensors)

    def _sensed(self, world: int) -> Array:
        """What the sensors show at a world's start."""
        model, data = self._models[world] if self._models else self._model, self._data[0]
        self._mujoco.mj_setState(model, data, self.states[world], self._mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self._mujoco.mj_forward(model, data)
        return np.array(data.sensordata)
