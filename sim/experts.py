"""Scripted experts: demonstrations without a human, for first steps and for tests.

An expert reads observations as a policy would and moves smoothly towards one target that depends on them; at most it
remembers how wide the fingers were a step ago. So a policy that sees two steps can know why the expert did what it
did, and each state has one way to act.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.errors import optional_module
from flowsteer.sim.tasks.arm_lift import HOME, JOINTS, ArmLift
from flowsteer.sim.tasks.base import Array, Arrays

Floats = NDArray[np.float64]

DELTA_M, DELTA_RAD = 0.05, 0.5
"""What an action of 1 asks of the arm (robosuite's OSC_POSE)."""
GAIN = 3.0
"""Asked displacement per displacement missing; the arm gets about a quarter of the way in a step."""
STALL_M = 3e-4
"""Fingers that close by less than this in a step are stopped by what they hold."""
OPEN, CLOSE = -1.0, 1.0
UP = np.array([0.0, 0.0, 0.02])


class Expert(ABC):
    """Acts step by step in one environment."""

    @abstractmethod
    def reset(self) -> None:
        """Begin a new episode."""

    @abstractmethod
    def act(self, observation: Arrays) -> Floats:
        """The action [Da] for this observation, in the task's units."""


@final
@dataclass
class Fingers:
    """Tells from two steps whether the fingers hold the object.

    near: how far from the grasp point the fingertips may be when they close, metres.
    widest: more than the object's width, less than the open fingers', metres.
    """

    near: float
    widest: float
    _width: float = field(default=0.0, init=False)

    def reset(self) -> None:
        """Forget the last step."""
        self._width = 0.0

    def update(self, distance: float, fingers: Array) -> tuple[bool, bool]:
        """(the object is between the fingers, the fingers hold it); `fingers` [2] are their joint positions."""
        width = float(fingers[0] - fingers[1])
        stopped, self._width = self._width - width < STALL_M, width
        between = distance < self.near
        return between, between and stopped and width < self.widest


@final
class LiftExpert(Expert):
    """Comes down over the cube without turning the hand, closes, and lifts.

    The pads' friction holds the cube at any angle, corner to corner too; turning the hand to its nearest side would
    make four jumps in what is to be learned.
    """

    def __init__(self) -> None:
        self._fingers = Fingers(near=0.02, widest=0.07)

    def reset(self) -> None:
        """See `Expert`."""
        self._fingers.reset()

    def act(self, observation: Arrays) -> Floats:
        """See `Expert`."""
        cube, tip = observation["object"][:3], observation["robot0_eef_pos"]
        between, held = self._fingers.update(float(np.linalg.norm(cube - tip)), observation["robot0_gripper_qpos"])
        goal = tip + UP if held else above(cube, tip)
        return move(observation, goal, CLOSE if between else OPEN)


@final
class CanExpert(Expert):
    """Comes down over the can, closes, carries it over the wall to its compartment, and lets go."""

    GRASP_ABOVE_CENTRE = np.array([0.0, 0.0, 0.01])
    COMPARTMENT = np.array([0.16, 0.36, 0.99])
    """Where to let go; the height is the fingertips', as all that follow."""
    CLEAR_OF_WALL = (0.95, 1.03)
    """Sideways motion starts at the first height and has its full speed at the second."""
    CARRY = 1.07

    def __init__(self) -> None:
        self._fingers = Fingers(near=0.02, widest=0.07)

    def reset(self) -> None:
        """See `Expert`."""
        self._fingers.reset()

    def act(self, observation: Arrays) -> Floats:
        """See `Expert`."""
        grasp, tip = observation["object"][:3] + self.GRASP_ABOVE_CENTRE, observation["robot0_eef_pos"]
        between, held = self._fingers.update(float(np.linalg.norm(grasp - tip)), observation["robot0_gripper_qpos"])
        arrived = float(np.linalg.norm(self.COMPARTMENT - tip)) < 0.03
        goal = self._carry(tip) if held or (between and arrived) else above(grasp, tip)
        return move(observation, goal, CLOSE if between and not arrived else OPEN)

    def _carry(self, tip: Array) -> Floats:
        goal = above(self.COMPARTMENT, tip, highest=self.CARRY - self.COMPARTMENT[2])
        low, high = self.CLEAR_OF_WALL
        goal[:2] = tip[:2] + np.clip((tip[2] - low) / (high - low), 0, 1) * (goal[:2] - tip[:2])
        return goal


@final
class ArmLiftExpert(Expert):
    """Comes down over the cube with the hand turned to its nearest sides, closes, and lifts; by joint targets.

    The targets are where the arm should be, no further away than `LEAD_M`: the arm's servos do not overshoot.
    """

    LEAD_M = 0.05
    """The arm follows about 0.1 s behind, so this makes up to 0.5 m/s."""
    LIFT = np.array([0.0, 0.0, 0.05])
    NEAR_M = 0.026
    """From the fingertips to the cube's centre when they close."""
    HELD_M = (0.03, 0.045)
    """Between the fingers when they hold the cube, which is 0.04 wide."""

    def __init__(self) -> None:
        self._arm = ArmKinematics()

    def reset(self) -> None:
        """It remembers nothing."""

    def act(self, observation: Arrays) -> Floats:
        """See `Expert`."""
        cube, tip = observation["object"][:3], observation["robot0_eef_pos"]
        left, right = observation["robot0_gripper_qpos"]
        between = float(np.linalg.norm(cube - tip)) < self.NEAR_M
        held = between and self.HELD_M[0] < left - right < self.HELD_M[1]
        goal = tip + self.LIFT if held else above(cube, tip)
        lead = (goal - tip) / max(1.0, float(np.linalg.norm(goal - tip)) / self.LEAD_M)
        joints = observation["robot0_joint_pos"].astype(np.float64)
        target = self._arm.toward(joints, lead, nearest_side_rad(observation["object"][3:7]))
        return np.append(target, CLOSE if between else OPEN)


@final
class ArmKinematics:
    """Where the Panda's joints put its hand, and how to move it: damped least squares (Nakamura 1986)."""

    DAMPING = 0.03
    """Metres per radian below which a direction counts as out of reach."""
    TO_HOME = 0.3
    """The part of the way to the home position that the spare joint goes in a step."""

    def __init__(self) -> None:
        self._mujoco, self._model = optional_module("mujoco", "mujoco"), _arm_model()
        self._data = self._mujoco.MjData(self._model)
        self._tip, self._hand = self._model.site("grip_site").id, self._model.body("right_hand").id

    def toward(self, joints: Array, displacement: Array, yaw: float) -> Floats:
        """Joint positions [7] that move the fingertips by `displacement` [3] metres, the hand down and turned by `yaw`.

        To first order in both; yaw is about z and 0 where the fingers close along y.
        """
        self._data.qpos[:JOINTS] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        jacobian = np.empty((6, self._model.nv))
        self._mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._tip)
        jacobian = jacobian[:, :JOINTS]
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + self.DAMPING**2 * np.eye(6))
        spare = np.eye(JOINTS) - inverse @ jacobian
        wanted = np.concatenate([displacement, turn_between(self._data.xmat[self._hand].reshape(3, 3), down(yaw))])
        result: Floats = joints + inverse @ wanted + self.TO_HOME * spare @ (HOME - joints)
        return result


@cache
def _arm_model() -> Any:
    return ArmLift().model()


def down(yaw: float) -> Floats:
    """The rotation matrix [3, 3] of a hand that points down and is turned by `yaw` about z."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])


def turn_between(old: Array, new: Array) -> Floats:
    """[3] the turn in the world's axes, in radians for small ones, that takes one rotation matrix to the other."""
    turn: Floats = np.cross(old, new, axis=0).sum(axis=1) / 2
    return turn


def nearest_side_rad(quaternion: Array) -> float:
    """The smallest turn about z, within pi/4, to the sides of a cube of quaternion x, y, z, w, whichever is its top.

    The axes that lie flat are at this angle up to quarter turns, which the fourth power of a complex number forgets.
    """
    x, y, z, w = quaternion.astype(np.float64)
    along_x = np.array([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)])
    along_y = np.array([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)])
    return float(np.angle(np.sum((along_x + 1j * along_y) ** 4)) / 4)


def above(target: Array, tip: Array, highest: float = 0.1) -> Floats:
    """The next goal on a way that is over the target before it is down at it: a funnel of slope 4, 8 mm wide."""
    aside = float(np.hypot(*(target - tip)[:2]))
    height = np.clip(4 * (aside - 0.008), 0, highest)
    return np.array([target[0], target[1], target[2] + height], dtype=np.float64)


def move(observation: Arrays, goal: Array, gripper: float) -> Floats:
    """The action [7] that takes the fingertips straight towards `goal`, the hand pointing down."""
    action = np.empty(7)
    delta = GAIN * (goal - observation["robot0_eef_pos"]) / DELTA_M
    action[:3] = delta / max(1.0, float(np.linalg.norm(delta)))
    action[3:6] = np.clip(upright_error(observation["robot0_eef_quat"]) / DELTA_RAD, -1, 1)
    action[6] = gripper
    return action


def upright_error(quaternion: Array) -> Floats:
    """[3] the turn in the world's axes, in radians, from a hand of quaternion x, y, z, w to one that points down.

    Down is (1, 0, 0, 0); the error quaternion is down * conjugate(q), of which twice the vector part is the turn,
    for small turns.
    """
    x, y, z, w = quaternion.astype(np.float64)
    error: Floats = 2 * np.copysign(1.0, x) * np.array([w, z, -y])
    return error


EXPERTS: dict[str, Callable[[], Expert]] = {
    "lift": LiftExpert,
    "can": CanExpert,
    "arm_lift": ArmLiftExpert,
}
"""By the name of the task that they are for."""
