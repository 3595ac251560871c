"""Two manipulation benchmarks of Gymnasium-Robotics: the Franka kitchen and the Adroit hand's door."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import replace
from typing import Any, ClassVar, final

from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.tasks.base import Array, SingleEnv, Task
from flowsteer.sim.tasks.gymnasium_env import MINARI_KEYS, RENDER_SIZE, GymnasiumEnv, state_spec

KITCHEN_SUBTASKS = (
    "bottom burner",
    "top burner",
    "light switch",
    "slide cabinet",
    "hinge cabinet",
    "microwave",
    "kettle",
)


def _environment(module: str, name: str, **settings: Any) -> Any:
    # The package prints advice about other tasks to stderr when it is imported.
    with redirect_stderr(io.StringIO()):
        make = getattr(optional_module(f"gymnasium_robotics.envs.{module}", "robotics"), name)
    return make(render_mode="rgb_array", width=RENDER_SIZE, height=RENDER_SIZE, **settings)


def _kitchen_state(observation: dict[str, Array]) -> Array:
    return observation["observation"]


def _kitchen_success(info: dict[str, Any]) -> bool:
    return not info["tasks_to_complete"]


@final
class Kitchen(Task):
    """A Franka arm in a kitchen: 9 joint velocities at 12.5 Hz; `state` is 9 + 9 robot and 21 + 20 object numbers.

    A step's reward is the number of subtasks completed in it, so the return is how many were completed; success and
    the episode's end are all of them.

    Args:
        subtasks: any of `KITCHEN_SUBTASKS`; by default the four of D4RL's "complete" and "partial" demonstrations.
    """

    heavy: ClassVar[bool] = True
    dataset_keys = MINARI_KEYS
    spec = replace(state_spec("kitchen", 59, 9, control_hz=12.5, max_episode_steps=280), zero_holds=True)

    def __init__(self, subtasks: tuple[str, ...] = ("microwave", "kettle", "bottom burner", "light switch")) -> None:
        unknown = sorted(set(subtasks) - set(KITCHEN_SUBTASKS))
        if unknown or not subtasks:
            raise SimError(f"kitchen: subtasks {unknown or 'is empty'}, choose of {', '.join(KITCHEN_SUBTASKS)}")
        self.subtasks = tuple(subtasks)

    def make(self) -> SingleEnv:
        """FrankaKitchen-v1."""
        env = _environment("franka_kitchen", "KitchenEnv", tasks_to_complete=list(self.subtasks))
        return GymnasiumEnv(env, state=_kitchen_state, success=_kitchen_success)


def _door_state(observation: Array) -> Array:
    return observation


def _door_success(info: dict[str, Any]) -> bool:
    return bool(info["success"])


@final
class AdroitDoor(Task):
    """A 24-joint hand on a moving wrist opens a latched door: 28 joint targets at 100 Hz; success is an angle of 1.35.

    Gymnasium-Robotics registers it with 200 steps, but the human demonstrations take 223 to 300.

    Args:
        max_episode_steps: the time limit.
    """

    heavy: ClassVar[bool] = False
    dataset_keys = MINARI_KEYS

    def __init__(self, max_episode_steps: int = 300) -> None:
        self.spec = state_spec("adroit_door", 39, 28, control_hz=100.0, max_episode_steps=max_episode_steps)

    def make(self) -> SingleEnv:
        """AdroitHandDoor-v1."""
        return GymnasiumEnv(_environment("adroit_hand", "AdroitHandDoorEnv"), state=_door_state, success=_door_success)
