"""Any MuJoCo environment of Gymnasium's kind as a `SingleEnv` with one observation, `state`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.environ import environment
from flowsteer.sim.errors import SimError
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import Array, Arrays, DatasetKey, SingleEnv, Step

RENDER_SIZE = 256
MINARI_KEYS = {"state": DatasetKey("observation")}
REMEDY = "install libegl1 and libgl1-mesa-dri (software rendering), or set MUJOCO_GL to one of egl, osmesa, glfw"


def state_spec(name: str, state_dim: int, action_dim: int, control_hz: float, max_episode_steps: int) -> TaskSpec:
    """Spec of a task that observes `state` [Do] and acts in [-1, 1]."""
    return TaskSpec(
        name=name,
        observations={"state": ArraySpec((state_dim,))},
        action_dim=action_dim,
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        control_hz=control_hz,
        max_episode_steps=max_episode_steps,
    )


@final
class GymnasiumEnv(SingleEnv):
    """Adapter.

    Args:
        env: unwrapped, `render_mode="rgb_array"`; the time limit is not its business.
        state: picks the state vector out of its observation.
        success: says from its `info` whether a step was successful.
    """

    def __init__(self, env: Any, state: Callable[[Any], Array], success: Callable[[dict[str, Any]], bool]) -> None:
        self._env, self._state, self._success = env, state, success

    def reset(self, seed: int) -> Arrays:
        """Start the episode of `seed`."""
        observation, _ = self._env.reset(seed=seed)
        return self._arrays(observation)

    def step(self, action: Array) -> Step:
        """Execute one action."""
        observation, reward, terminated, _, info = self._env.step(action)
        return Step(self._arrays(observation), float(reward), bool(terminated), self._success(info))

    def render(self) -> NDArray[np.uint8]:
        """The view of the environment's own camera, [256, 256, 3].

        Raises:
            SimError: no graphics library, with the remedy.
        """
        library = os.environ.get("MUJOCO_GL") or "egl"
        try:
            with environment({"MUJOCO_GL": library}):
                picture: NDArray[np.uint8] = self._env.render()
        except Exception as error:  # each library fails in its own way: ImportError, AttributeError, GLError
            raise SimError(f"cannot render off screen with MUJOCO_GL={library} ({error}): {REMEDY}") from error
        return picture

    def project(self, actions: Array) -> None:
        """Joint commands have no place in the picture."""

    def close(self) -> None:
        """Free the renderer."""
        self._env.close()

    def _arrays(self, observation: Any) -> Arrays:
        return {"state": self._state(observation).astype(np.float32)}
