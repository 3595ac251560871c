"""Tasks of robosuite 1.5 as robomimic uses them: a Panda arm, 20 Hz, delta poses, 400 steps, success ends the episode.

Observations carry robomimic's names and follow its data:
    object               pose of the object, and where it is seen from the gripper; 10 (lift) or 14 numbers
    robot0_eef_pos       fingertips, metres
    robot0_eef_quat      quaternion x, y, z, w of the hand's body (not of the fingertips' site)
    robot0_gripper_qpos  the two fingers, metres
    <camera>_image       instead of `object` where images are asked for; uint8, the first row on top

The order and the signs inside `object` changed between robosuite 1.4 (most public data) and 1.5: `object_layout` says
which one is meant, and `task_from_env_args` takes it from the data.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

from flowsteer.policies.spec import ArraySpec, configurable
from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import DatasetKey, Task
from flowsteer.sim.tasks.robosuite_setup import ObjectLayout, OscGains, RobosuiteSetup, World

if TYPE_CHECKING:
    from flowsteer.sim.tasks.robosuite_env import RobosuiteEnv

CAMERAS = ("agentview", "robot0_eye_in_hand")
OBJECT_LAYOUTS: tuple[ObjectLayout, ...] = ("1.4", "1.5")
ENV_VERSION = "1.5.1"
ROBOMIMIC_TYPE = 1
"""How robomimic numbers simulators; 1 is robosuite."""


class RobosuiteTask(Task, ABC):
    """A robosuite world with a Panda arm.

    Args:
        images: observe cameras instead of `object`.
        cameras: which ones.
        image_size: side of their pictures.
        object_layout: "1.4" or "1.5".
        control_hz: env steps per second.
        controller: controller config of robosuite or robomimic; None is robosuite's default for the Panda.

    Raises:
        SimError: an unknown layout, or a controller that is not an OSC_POSE delta controller.
    """

    heavy: ClassVar[bool] = True
    world: ClassVar[World]

    @final
    def __init__(
        self,
        images: bool = False,
        cameras: tuple[str, ...] = CAMERAS,
        image_size: int = 84,
        object_layout: ObjectLayout = "1.4",
        control_hz: float = 20.0,
        controller: dict[str, Any] | None = None,
    ) -> None:
        if object_layout not in OBJECT_LAYOUTS:
            raise SimError(f"{self.world.name}: object_layout '{object_layout}' is unknown, choose one of 1.4, 1.5")
        self.dataset_keys: Mapping[str, DatasetKey] = {}
        self.setup = RobosuiteSetup(
            world=self.world,
            object_layout=object_layout,
            gains=OscGains.from_robosuite(controller or {}),
            control_hz=control_hz,
            cameras=tuple(cameras) if images else (),
            image_size=image_size,
        )
        self.spec = TaskSpec(
            name=f"{self.world.name}_image" if images else self.world.name,
            observations=_observations(self.setup),
            action_dim=7,
            action_low=(-1.0,) * 7,
            action_high=(1.0,) * 7,
            control_hz=control_hz,
            max_episode_steps=400,
            zero_holds=True,
            discrete=(6,),
        )

    @final
    def make(self) -> RobosuiteEnv:
        """One world; the first one in a process takes about 2 s."""
        env: RobosuiteEnv = optional_module("flowsteer.sim.tasks.robosuite_env", "robosuite").RobosuiteEnv(self.setup)
        return env

    @final
    def env_args(self) -> dict[str, Any]:
        """What robomimic stores beside demonstrations as `env_args`; `task_from_env_args` inverts it."""
        setup = self.setup
        return {
            "env_name": self.world.env_name,
            "env_version": ENV_VERSION,
            "type": ROBOMIMIC_TYPE,
            "object_layout": setup.object_layout,
            "env_kwargs": {
                "robots": ["Panda"],
                "controller_configs": setup.gains.to_robosuite(),
                "control_freq": setup.control_hz,
                "has_renderer": False,
                "has_offscreen_renderer": bool(setup.cameras),
                "use_camera_obs": bool(setup.cameras),
                "use_object_obs": True,
                "camera_names": list(setup.cameras),
                "camera_heights": setup.image_size,
                "camera_widths": setup.image_size,
                "ignore_done": True,
                "reward_shaping": False,
            },
        }


@final
class Lift(RobosuiteTask):
    """Lift the cube 4 cm off the table."""

    world = World("lift", "Lift", "cube_main", 10)


@final
class Can(RobosuiteTask):
    """Carry the can from the left bin to its compartment of the right one, and let go."""

    world = World("can", "PickPlaceCan", "Can_main", 14)


@final
class Square(RobosuiteTask):
    """Put the square nut over the square peg, and let go."""

    world = World("square", "NutAssemblySquare", "SquareNut_main", 14)


ROBOSUITE_TASKS: dict[str, type[RobosuiteTask]] = {task.world.env_name: task for task in (Lift, Can, Square)}


@configurable
def task_from_env_args(env_args: Mapping[str, Any]) -> RobosuiteTask:
    """The task that a robomimic data set was recorded in.

    Args:
        env_args: the parsed JSON of the attribute `env_args` of `data`, of robosuite 1.2 or later.

    Raises:
        SimError: not such JSON, or an unknown environment, robot, version or controller.
    """
    if not isinstance(env_args, Mapping) or not isinstance(env_args.get("env_kwargs", {}), Mapping):
        raise SimError("env_args: it and its env_kwargs must be mappings, as robomimic stores them")
    name, kwargs = env_args.get("env_name"), env_args.get("env_kwargs", {})
    if name not in ROBOSUITE_TASKS:
        raise SimError(f"env_args: env_name '{name}' is unknown, choose one of {sorted(ROBOSUITE_TASKS)}")
    robots = kwargs.get("robots", "Panda")
    if robots not in ("Panda", ["Panda"]):
        raise SimError(f"env_args: robots {robots!r} is not supported, only 'Panda'")
    images = bool(kwargs.get("use_camera_obs", False))
    return ROBOSUITE_TASKS[name](
        images=images,
        cameras=tuple(_listed(kwargs.get("camera_names", CAMERAS))),
        image_size=_image_size(kwargs) if images else 84,
        object_layout=env_args.get("object_layout") or _layout(env_args.get("env_version")),
        control_hz=float(kwargs.get("control_freq", 20)),
        controller=kwargs.get("controller_configs"),
    )


def _observations(setup: RobosuiteSetup) -> dict[str, ArraySpec]:
    side = setup.image_size
    seen = {f"{camera}_image": ArraySpec((side, side, 3), "uint8") for camera in setup.cameras}
    return {
        **(seen or {"object": ArraySpec((setup.world.object_width,))}),
        "robot0_eef_pos": ArraySpec((3,)),
        "robot0_eef_quat": ArraySpec((4,)),
        "robot0_gripper_qpos": ArraySpec((2,)),
    }


def _layout(version: Any) -> ObjectLayout:
    """Of robosuite's version; files that do not tell it, which are old, have 1.4's."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version or "1.4"))
    if numbers is None:
        raise SimError(
            f"env_args: env_version {version!r} is not a version such as '1.4.1': correct it, or add object_layout"
        )
    return "1.5" if tuple(map(int, numbers.groups())) >= (1, 5) else "1.4"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _image_size(kwargs: Mapping[str, Any]) -> int:
    sizes = {size for key in ("camera_heights", "camera_widths") for size in _listed(kwargs.get(key, 84))}
    if len(sizes) != 1:
        raise SimError(f"env_args: pictures must be square and of one size, got {sorted(sizes)}")
    return int(sizes.pop())
