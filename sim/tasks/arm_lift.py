"""A Panda arm lifts a cube off a table, by joint targets at 20 Hz; light enough to step thousands of times a second.

The arm and its gripper are robosuite's models. What is left of them can be stepped fast: masses and joints, position
actuators in place of torque motors, the two fingertips as boxes that touch the cube and the table. The rest of the arm
touches nothing. Gravity is compensated in the arm, as the real one's controller does.

The table's top is z = 0, the arm's base is the origin and looks along x. Observations carry robosuite's names where it
has them; quaternions are x, y, z, w, with the sign that keeps them from jumping here:
    robot0_joint_pos     the arm's joints, rad
    robot0_gripper_qpos  the two fingers, metres; open is (0.04, -0.04)
    robot0_eef_pos       between the fingertips, metres
    robot0_eef_quat      of the hand, x > 0; (1, 0, 0, 0) points down and closes along y
    object               the cube's position [3], its quaternion [4] with w > 0, its position from the fingertips [3]

Actions [8] are the arm's joint targets, rad, and the gripper's: -1 is open, 1 is closed, between them is part open.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import DatasetKey
from flowsteer.sim.tasks.mujoco_task import Batch, Judgement, MujocoTask, State, Xp

JOINTS = 7
JOINT_LOW = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
JOINT_HIGH = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
HOME = (0.0, 0.2125, 0.0, -2.1675, 0.0, 2.38, math.pi / 4)
"""Fingertips 0.2 m above the middle of the cube's region, pointing down."""
HOME_NOISE_RAD = 0.02
OPEN = (0.04, -0.04)
"""Joint positions of the open fingers, metres; closed is 0."""

STIFFNESS = (920.0, 970.0, 670.0, 650.0, 200.0, 155.0, 80.0)
"""N m / rad: each joint alone, with what it carries at home, swings back at 20 rad/s ..."""
DAMPING = (92.0, 97.0, 67.0, 65.0, 20.0, 15.5, 8.0)
"""N m s / rad: ... critically damped."""
TORQUE = (80.0, 80.0, 80.0, 80.0, 80.0, 12.0, 12.0)
"""Limits of robosuite's motors, N m."""

CUBE_HALF = 0.02
CUBE_KG = 0.064
"""Of water's density, as robosuite's."""
REGION = ((0.46, -0.1), (0.66, 0.1))
"""Where the cube's centre starts, metres."""
YAW = math.pi / 4
"""It is turned by up to this: more looks the same."""
LIFTED = 0.04
"""The cube's centre is this much higher than when it lies on the table, metres."""

HIDDEN = 4
"""A group that MuJoCo does not draw."""
FINGERTIP = (0.008, 0.004, 0.0113)
"""Half the box that stands for it, metres: robosuite's pad, made as long as the finger."""
FINGERTIP_Z = -0.0117
"""Its middle in the fingertip's frame, metres."""


@final
class ArmLift(MujocoTask):
    """Lift the cube by 4 cm: reward 1, and the end."""

    dataset_keys: Mapping[str, DatasetKey] = MappingProxyType({})
    frame_skip = 10
    camera = "front"
    spec = TaskSpec(
        name="arm_lift",
        observations={
            "object": ArraySpec((10,)),
            "robot0_joint_pos": ArraySpec((JOINTS,)),
            "robot0_eef_pos": ArraySpec((3,)),
            "robot0_eef_quat": ArraySpec((4,)),
            "robot0_gripper_qpos": ArraySpec((2,)),
        },
        action_dim=JOINTS + 1,
        action_low=(*JOINT_LOW, -1.0),
        action_high=(*JOINT_HIGH, 1.0),
        control_hz=20.0,
        max_episode_steps=200,
        discrete=(JOINTS,),
    )

    def load(self) -> Any:
        """The arm, its gripper, a table and a cube; qpos is 7 joints, 2 fingers, the cube's pose."""
        mujoco = optional_module("mujoco", "robosuite")
        robots = os.path.join(robosuite_assets(), "robots", "panda", "robot.xml")
        grippers = os.path.join(robosuite_assets(), "grippers", "panda_gripper.xml")
        try:
            scene, gripper = mujoco.MjSpec.from_file(robots), mujoco.MjSpec.from_file(grippers)
            _attach(scene, gripper)
            _lighten(scene)
            _fingertips(mujoco, scene)
            _actuators(mujoco, scene)
            _surroundings(mujoco, scene)
            _sensors(mujoco, scene)
            scene.option.timestep = 1 / (self.spec.control_hz * self.frame_skip)
            scene.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
            return scene.compile()
        except (ValueError, AttributeError, KeyError) as error:
            raise SimError(
                f"arm_lift: robosuite's Panda does not load ({' '.join(str(error).split())}): "
                "pip install 'flowsteer[robosuite]'"
            ) from error

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """The cube's x, y and yaw and the joints' noise, each uniform in [-1, 1], [10]."""
        return rng.uniform(-1, 1, 3 + JOINTS)

    def initial(self, xp: Xp, draws: Batch) -> tuple[Batch, Batch]:
        """The arm near home, the gripper open, the cube flat on the table."""
        low, high, home, fingers = (_constant(xp, value, draws) for value in (*REGION, HOME, OPEN))
        xy = (low + high) / 2 + draws[..., :2] * (high - low) / 2
        half_yaw, zero = draws[..., 2:3] * YAW / 2, xp.zeros_like(draws[..., :1])
        qpos = [
            home + HOME_NOISE_RAD * draws[..., 3:],
            xp.broadcast_to(fingers, (*draws.shape[:-1], 2)),
            *(xy, zero + CUBE_HALF),
            *(xp.cos(half_yaw), zero, zero, xp.sin(half_yaw)),
        ]
        return xp.concat(qpos, axis=-1), xp.concat([xp.zeros_like(draws), zero, zero, zero, zero, zero], axis=-1)

    def control(self, xp: Xp, actions: Batch) -> Batch:
        """Targets of the joints and of the two fingers."""
        fingers = (1 - actions[..., JOINTS:]) / 2 * _constant(xp, OPEN, actions)
        return xp.concat([actions[..., :JOINTS], fingers], axis=-1)

    def observe(self, xp: Xp, state: State) -> dict[str, Batch]:
        """See the top of this file."""
        eef, cube = state.sensors[..., :3], state.qpos[..., 9:12]
        return {
            "object": xp.concat([cube, _xyzw(xp, state.qpos[..., 12:16], positive=0), cube - eef], axis=-1),
            "robot0_joint_pos": state.qpos[..., :JOINTS],
            "robot0_eef_pos": eef,
            "robot0_eef_quat": _xyzw(xp, state.sensors[..., 3:7], positive=1),
            "robot0_gripper_qpos": state.qpos[..., JOINTS : JOINTS + 2],
        }

    def judge(self, xp: Xp, before: State, actions: Batch, after: State) -> Judgement:
        """1, solved and over when it is lifted."""
        lifted = after.qpos[..., 11] > CUBE_HALF + LIFTED
        return Judgement(xp.where(lifted, 1.0, 0.0), lifted, lifted)


def robosuite_assets() -> str:
    """The folder of robosuite's models, found without importing robosuite, which takes seconds and may ask for GL.

    Raises:
        SimError: robosuite is not installed.
    """
    package = find_spec("robosuite") or optional_module("robosuite", "robosuite").__spec__
    return os.path.join(os.path.dirname(str(package.origin)), "models", "assets")


def _attach(scene: Any, gripper: Any) -> None:
    for sensor in list(gripper.sensors):
        gripper.delete(sensor)
    for actuator in list(gripper.actuators):
        gripper.delete(actuator)
    scene.attach(gripper, prefix="", frame=scene.body("right_hand").add_frame())


def _lighten(scene: Any) -> None:
    """Keep one mesh per link, to look at; nothing of them touches anything."""
    for geom in list(scene.geoms):
        geom.contype, geom.conaffinity, geom.rgba = 0, 0, (0.9, 0.9, 0.9, 1)
        if geom.group == 1:
            scene.delete(geom)
    shown = {geom.meshname for geom in scene.geoms}
    meshes = [mesh for mesh in scene.meshes if mesh.name not in shown]
    sites = [site for site in scene.sites if site.name != "grip_site"]
    for part in (*meshes, *scene.materials, *scene.cameras, *sites):
        scene.delete(part)
    scene.site("grip_site").group = HIDDEN
    for body in scene.bodies:
        body.gravcomp = 1


def _fingertips(mujoco: Any, scene: Any) -> None:
    """The pads touch the cube and the table, not each other."""
    for finger in ("finger1", "finger2"):
        pad = scene.geom(f"{finger}_pad_collision")
        pad.size, pad.pos[2] = FINGERTIP, FINGERTIP_Z
        pad.contype, pad.conaffinity, pad.priority = 1, 0, 1
        pad.solref, pad.solimp[:3] = (0.01, 1.0), (0.95, 0.99, 0.001)
    for joint in ("finger_joint1", "finger_joint2"):
        scene.joint(joint).frictionloss = 0.0


def _actuators(mujoco: Any, scene: Any) -> None:
    """A servo per joint, in the order of the joints."""
    for actuator in list(scene.actuators):
        scene.delete(actuator)
    for i, gains in enumerate(zip(STIFFNESS, DAMPING, TORQUE, JOINT_LOW, JOINT_HIGH, strict=True), 1):
        _servo(mujoco, scene, f"joint{i}", *gains)
    for i, opened in enumerate(OPEN, 1):
        _servo(mujoco, scene, f"finger_joint{i}", 1000.0, 0.0, 20.0, min(opened, 0.0), max(opened, 0.0))


def _servo(mujoco: Any, scene: Any, joint: str, kp: float, kd: float, limit: float, low: float, high: float) -> None:
    servo = scene.add_actuator(
        name=joint,
        target=joint,
        trntype=mujoco.mjtTrn.mjTRN_JOINT,
        ctrlrange=(low, high),
        ctrllimited=True,
        forcerange=(-limit, limit),
        forcelimited=True,
    )
    servo.set_to_position(kp=kp, kv=kd)


def _surroundings(mujoco: Any, scene: Any) -> None:
    """The table, a plane, the cube on it, and what it takes to film them."""
    world = scene.worldbody
    world.add_light(pos=(0.5, 0.5, 2), dir=(0, -0.25, -1))
    # Along -x, 20 degrees down.
    world.add_camera(name="front", pos=(1.7, 0, 0.75), quat=(0.5792, 0.4056, 0.4056, 0.5792))
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=(1, 1, 0.05),
        rgba=(0.8, 0.75, 0.7, 1),
        contype=0,
        conaffinity=1,
    )
    cube = world.add_body(name="cube", pos=(0, 0, CUBE_HALF))
    cube.add_freejoint(name="cube")
    cube.add_geom(
        name="cube", type=mujoco.mjtGeom.mjGEOM_BOX, size=3 * (CUBE_HALF,), mass=CUBE_KG, rgba=(0.8, 0.2, 0.15, 1)
    )


def _sensors(mujoco: Any, scene: Any) -> None:
    """Sensor data are the fingertips' position [3] and the hand's quaternion [4]; w, x, y, z."""
    kinds, objects = mujoco.mjtSensor, mujoco.mjtObj
    scene.add_sensor(name="eef_pos", type=kinds.mjSENS_FRAMEPOS, objtype=objects.mjOBJ_SITE, objname="grip_site")
    scene.add_sensor(name="eef_quat", type=kinds.mjSENS_FRAMEQUAT, objtype=objects.mjOBJ_BODY, objname="right_hand")


def _constant(xp: Xp, values: tuple[float, ...], like: Batch) -> Batch:
    return xp.asarray(values, dtype=like.dtype, device=like.device)


def _xyzw(xp: Xp, wxyz: Batch, positive: int) -> Batch:
    """The quaternion with its last number first, and of its two signs the one that makes wxyz[..., positive] > 0."""
    sign = xp.where(wxyz[..., positive : positive + 1] < 0, -1.0, 1.0)
    return sign * xp.concat([wxyz[..., 1:], wxyz[..., :1]], axis=-1)
