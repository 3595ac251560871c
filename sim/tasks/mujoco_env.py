"""A MuJoCo task as a single environment: to film, to step beside others, to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.chunk import sane
from flowsteer.sim.complaints import causes, heard
from flowsteer.sim.errors import EpisodeLostError, optional_module
from flowsteer.sim.tasks.base import Array, Arrays, SingleEnv, Step
from flowsteer.sim.tasks.gymnasium_env import RENDER_SIZE
from flowsteer.sim.tasks.mujoco_task import MujocoTask, State
from flowsteer.sim.tasks.randomization import Randomization

if TYPE_CHECKING:
    # Needs MuJoCo, whose absence is told when an environment is made.
    from flowsteer.sim.tasks.offscreen import OffscreenRenderer

SHADOW_MAP = 1024
"""Pixels a side. Of MuJoCo's usual 4096 a picture without a GPU takes four times as long, and looks the same."""


@final
class MujocoEnv(SingleEnv):
    """One world of `task`."""

    def __init__(self, task: MujocoTask) -> None:
        self._mujoco = optional_module("mujoco", "mujoco")
        self._task = task
        self._model = task.model()
        self._data = self._mujoco.MjData(self._model)
        self._warnings = self._data.warning.number
        """MuJoCo's own count of each kind."""
        self._complaints: list[str] = []
        self._randomization = Randomization(self._model, task.randomize)
        self._renderer: OffscreenRenderer | None = None

    def reset(self, seed: int) -> Arrays:
        """Start the episode of `seed`."""
        (qpos,), (qvel,) = self._task.initial(np, self._task.draws([seed]))
        with heard(self._task.spec.name, self._complaints):
            self._randomization.apply(self._model, self._data, seed)
            self._mujoco.mj_resetData(self._model, self._data)
            self._data.qpos[:], self._data.qvel[:] = qpos, qvel
            self._mujoco.mj_forward(self._model, self._data)
        # The first step would complain of the same.
        self._warnings[:] = 0
        self._complaints.clear()
        return self._observe(self._state())

    def step(self, action: Array) -> Step:
        """Hold one action for a control step.

        Raises:
            EpisodeLostError: the world has blown up, or its contacts did not fit into memory.
        """
        before = self._state()
        self._data.ctrl[:] = self._task.control(np, action)
        with heard(self._task.spec.name, self._complaints):
            # As in `mujoco.rollout`, which ends a world before the physics step that follows a warning.
            self._mujoco.mj_step(self._model, self._data, nstep=self._task.frame_skip - 1)
            stopped = self._warnings.any()
            self._mujoco.mj_step(self._model, self._data)
        after = self._state()
        if stopped or not sane(np, after):
            raise EpisodeLostError(causes(self._task.spec.name, self._complaints)[0])
        judged = self._task.judge(np, before, action, after)
        return Step(self._observe(after), float(judged.reward), bool(judged.terminated), bool(judged.success))

    def render(self) -> NDArray[np.uint8]:
        """The view of the task's camera, [256, 256, 3].

        Raises:
            SimError: no graphics library, with the remedy.
        """
        if self._renderer is None:
            from flowsteer.sim.tasks.offscreen import OffscreenRenderer

            self._model.vis.quality.shadowsize = SHADOW_MAP
            self._renderer = OffscreenRenderer(self._model, RENDER_SIZE)
        return self._renderer.render(self._data, self._task.camera, RENDER_SIZE)

    def project(self, actions: Array) -> NDArray[np.float64] | None:
        """As the task says."""
        return self._task.project(actions)

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _state(self) -> State:
        return State(self._data.qpos.copy(), self._data.qvel.copy(), self._data.sensordata.copy())

    def _observe(self, state: State) -> Arrays:
        return {key: np.asarray(array, np.float32) for key, array in self._task.observe(np, state).items()}
