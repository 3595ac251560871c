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
from flowsteer.sim.complaints import Tell, WarnOnce, causes, heard, not_finite
from flowsteer.sim.cores import usable_cores
from flowsteer.sim.errors import optional_module
from flowsteer.sim.pool import Pool
from flowsteer.sim.slot import OUTCOME, Outcomes, shown_finite, window_arrays
from flowsteer.sim.tasks.base import Array, Arrays
from flowsteer.sim.tasks.mujoco_task import MujocoTask, State
from flowsteer.sim.tasks.randomization import Randomization


@final
class RolloutPool(Pool):
    """`num_envs` worlds of `task`.

    A world that blows up or of which MuJoCo warns is lost: its episode counts for nothing, the others go on. What
    MuJoCo warns of in the last physics step of a chunk is known in the next chunk, if it is still so then.

    Args:
        task, num_envs, observation_steps: B worlds of which.
        threads: one per usable core when not given.
        tell: why episodes are lost, by default a warning once of each cause.

    Attributes:
        states: [B, ...] of all worlds now, as `mujoco.rollout` lays them out: time, qpos, qvel, actuator states.
    """

    def __init__(
        self,
        task: MujocoTask,
        num_envs: int,
        observation_steps: int,
        threads: int | None = None,
        tell: Tell | None = None,
    ) -> None:
        self._task, self._observation_steps, self._tell = task, observation_steps, tell or WarnOnce()
        self._mujoco, rollout = optional_module("mujoco", "mujoco"), optional_module("mujoco.rollout", "mujoco")
        self._model = task.model()
        threads = min(num_envs, threads or usable_cores())
        self._data = [self._mujoco.MjData(self._model) for _ in range(threads)]
        self._try_one()
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
        self.states[worlds] = 0
        self.states[worlds, 1 : 1 + self._model.nq + self._model.nv] = np.concatenate([qpos, qvel], axis=1)
        # Whatever MuJoCo complains of at the start, it will do so again in the first step.
        with heard(self._task.spec.name, []):
            for i in seeds if self._models else ():
                self._randomization.apply(self._models[i], self._data[0], seeds[i])
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
        complaints: list[str] = []
        states, sensors = self._simulate(worlds, chunks, complaints)
        before, after = self._state(states[:, :-1], sensors[:, :-1]), self._state(states[:, 1:], sensors[:, 1:])
        steps_left = self._task.spec.max_episode_steps - self._steps[worlds]
        sound = sane(np, after) & self._went_on(states)
        judged = judge_chunk(np, self._task, before, chunks, after, steps_left, sound)
        last = judged.env_steps
        self._remember(worlds, after, last - judged.lost)
        rows = np.arange(len(worlds))
        self.states[worlds], self._sensors[worlds] = states[rows, last], sensors[rows, last]
        self._steps[worlds] += last
        outcomes = np.zeros(len(worlds), dtype=OUTCOME)
        for name in OUTCOME.names or ():
            outcomes[name] = getattr(judged, name)
        finite = np.isfinite(judged.reward_sum) & shown_finite(window[worlds] for window in self.windows.values())
        for name in ("terminated", "truncated"):
            outcomes[name] &= finite
        self._explain(complaints, blown_up=judged.lost & finite, faulty=~finite)
        return outcomes, set(worlds[judged.lost | ~finite].tolist())

    def close(self) -> None:
        """See `Pool`."""
        self._rollout.close()

    def _try_one(self) -> None:
        """Step one world here, where it gives an error: MuJoCo ends the process if a thread of Rollout cannot go on.

        Raises:
            SimError: the model's memory does not even hold a start.
        """
        data = self._data[0]
        (data.qpos[:],), (data.qvel[:],) = self._task.initial(np, self._task.draws([0]))
        with heard(self._task.spec.name, []):
            self._mujoco.mj_step(self._model, data)

    def _simulate(self, worlds: NDArray[np.int64], chunks: Array, complaints: list[str]) -> tuple[Array, Array]:
        """States [n, 1 + Ta, ...] and sensors [n, 1 + Ta, ...] before the chunk and after each control step.

        What MuJoCo warns of is added to `complaints`.
        """
        skip = self._task.frame_skip
        control = np.repeat(np.asarray(self._task.control(np, chunks), np.float64), skip, axis=1)
        starts = self.states[worlds]
        # Rollout has its own arrays made and returns every physics step; only the last of each control step counts.
        models = [self._models[i] for i in worlds] if self._models else self._model
        with heard(self._task.spec.name, complaints):
            states, sensors = self._rollout.rollout(models, self._data, starts, control)
        return (
            np.concatenate([starts[:, None], states[:, skip - 1 :: skip]], axis=1),
            np.concatenate([self._sensors[worlds][:, None], sensors[:, skip - 1 :: skip]], axis=1),
        )

    def _explain(self, complaints: list[str], blown_up: NDArray[np.bool_], faulty: NDArray[np.bool_]) -> None:
        """Tell why the worlds of these masks [n] are lost."""
        if blown_up.any():
            self._tell(causes(self._task.spec.name, complaints))
        if faulty.any():
            self._tell([not_finite(self._task.spec.name)])

    def _went_on(self, states: Array) -> NDArray[np.bool_]:
        """[n, Ta] bool: whether control steps were made; Rollout repeats the last state after MuJoCo has warned."""
        made: NDArray[np.bool_] = np.diff(states[..., 0]) > (self._task.frame_skip - 0.5) * self._model.opt.timestep
        return made

    def _remember(self, worlds: NDArray[np.int64], after: State, steps: NDArray[np.int64]) -> None:
        """Append the observations of the first steps [n] to the windows."""
        recent = steps[:, None] + np.arange(self._observation_steps)
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
