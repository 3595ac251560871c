"""Gymnasium's planar runners, version 5. They have no notion of success: judge them by the return."""

from __future__ import annotations

from typing import Any, ClassVar, final

from flowsteer.sim.errors import optional_module
from flowsteer.sim.tasks.base import Array, SingleEnv, Task
from flowsteer.sim.tasks.gymnasium_env import MINARI_KEYS, RENDER_SIZE, GymnasiumEnv, state_spec


def _observation(observation: Array) -> Array:
    return observation


def _never(info: dict[str, Any]) -> bool:
    return False


def _runner(module: str, name: str) -> SingleEnv:
    make = getattr(optional_module(f"gymnasium.envs.mujoco.{module}", "mujoco"), name)
    env = make(render_mode="rgb_array", width=RENDER_SIZE, height=RENDER_SIZE)
    return GymnasiumEnv(env, state=_observation, success=_never)


@final
class Hopper(Task):
    """One leg, 3 joint torques, 125 Hz; ends when it falls."""

    heavy: ClassVar[bool] = False
    dataset_keys = MINARI_KEYS
    spec = state_spec("hopper", state_dim=11, action_dim=3, control_hz=125.0, max_episode_steps=1000)

    def make(self) -> SingleEnv:
        """Hopper-v5."""
        return _runner("hopper_v5", "HopperEnv")


@final
class Walker2d(Task):
    """Two legs, 6 joint torques, 125 Hz; ends when it falls."""

    heavy: ClassVar[bool] = False
    dataset_keys = MINARI_KEYS
    spec = state_spec("walker2d", state_dim=17, action_dim=6, control_hz=125.0, max_episode_steps=1000)

    def make(self) -> SingleEnv:
        """Walker2d-v5."""
        return _runner("walker2d_v5", "Walker2dEnv")


@final
class HalfCheetah(Task):
    """Two legs that cannot fall, 6 joint torques, 20 Hz."""

    heavy: ClassVar[bool] = False
    dataset_keys = MINARI_KEYS
    spec = state_spec("halfcheetah", state_dim=17, action_dim=6, control_hz=20.0, max_episode_steps=1000)

    def make(self) -> SingleEnv:
        """HalfCheetah-v5."""
        return _runner("half_cheetah_v5", "HalfCheetahEnv")
