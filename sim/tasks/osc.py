"""Operational-space control of a robot arm: robosuite's controller without its per-substep bookkeeping.

robosuite spends two thirds of an env step in Python here, 25 times per step, and compiles its helpers with numba for
about 15 s on first use. The same law takes a handful of LAPACK calls. Khatib 1987, "A unified approach for motion and
force control of robot manipulators". Imports MuJoCo and SciPy, so only what needs them imports this module.
"""

from __future__ import annotations

from typing import final

import mujoco
import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv
from scipy.spatial.transform import Rotation

from flowsteer.sim.tasks.robosuite_setup import OscGains

Floats = NDArray[np.float64]

NULLSPACE_KP = 10.0
"""Stiffness of the pull towards the first joint positions, 1/s^2; fixed in robosuite."""
NULLSPACE_KD = 2 * NULLSPACE_KP**0.5


@final
class OscController:
    """Torques of one arm in one MuJoCo simulation; made anew at each episode's start.

    Args:
        model, data: the simulation, its kinematics up to date.
        gains: the control law.
        site: index of the controlled site.
        base_rotation: [3, 3] axes of the robot's base, which stands still.
        joints: the arm's hinges as a slice of qpos and of qvel alike (no free joint comes before them).
        motors: the arm's actuators as a slice of ctrl.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        gains: OscGains,
        site: int,
        base_rotation: Floats,
        joints: slice,
        motors: slice,
    ) -> None:
        self._model, self._data, self._site = model, data, site
        # Views into the simulation's memory: reading attributes of MjData 25 times per env step costs more than this.
        self._position, self._rotation = data.site_xpos[site], data.site_xmat[site].reshape(3, 3)
        self._angles, self._velocity, self._bias = data.qpos[joints], data.qvel[joints], data.qfrc_bias[joints]
        self._ctrl, (self._low, self._high) = data.ctrl[motors], model.actuator_ctrlrange[motors].T
        jacobian, inertia = np.zeros((6, model.nv)), np.zeros((model.nv, model.nv))
        self._jacobian_halves, self._jacobian = (jacobian[:3], jacobian[3:]), jacobian[:, joints]
        self._whole_inertia, self._inertia = inertia, inertia[joints, joints]

        self._delta_max, self._kp = np.array(gains.delta_max), np.array(gains.kp)
        self._kd = 2 * gains.damping_ratio * np.sqrt(self._kp)
        self._frame = base_rotation if gains.frame == "base" else np.eye(3)
        self._rest = self._angles.copy()
        self._goal_position, self._goal_rotation = self._position.copy(), self._rotation.copy()

    def set_goal(self, action: Floats) -> None:
        """Put the goal at the current pose plus the scaled delta of `action` [6]; kinematics must be up to date."""
        delta = np.clip(action, -1, 1) * self._delta_max
        turn = self._frame @ Rotation.from_rotvec(delta[3:]).as_matrix() @ self._frame.T
        self._goal_position = self._position + self._frame @ delta[:3]
        self._goal_rotation = turn @ self._rotation

    def apply(self) -> None:
        """Write the motor torques for the state that `mj_step1` has just prepared."""
        mujoco.mj_jacSite(self._model, self._data, *self._jacobian_halves, self._site)
        mujoco.mj_fullM(self._model, self._whole_inertia, self._data.qM)
        jacobian, inertia, velocity = self._jacobian, self._inertia, self._velocity

        # J M^-1 J^T, the inverse of the arm's inertia as felt at the site.
        mobility = jacobian.dot(dposv(inertia, jacobian.T)[1])
        acceleration = self._kp * self._pose_error() - self._kd * jacobian.dot(velocity)
        # Position and orientation are decoupled: each sees the inverse of its own 3x3 block.
        force = dposv(mobility[:3, :3], acceleration[:3])[1]
        torque = dposv(mobility[3:, 3:], acceleration[3:])[1]

        # N^T M a = M a - J^T (J M^-1 J^T)^-1 J a: the part of the pull to rest that the site does not feel.
        pull = NULLSPACE_KP * (self._rest - self._angles) - NULLSPACE_KD * velocity
        wrench = np.concatenate((force, torque)) - dposv(mobility, jacobian.dot(pull))[1]
        torques = wrench.dot(jacobian) + inertia.dot(pull) + self._bias
        np.minimum(np.maximum(torques, self._low), self._high, out=self._ctrl)

    def _pose_error(self) -> Floats:
        """[6] from the site's pose to the goal: metres, and sin(angle) times the axis."""
        turn = self._goal_rotation.dot(self._rotation.T)
        error = np.empty(6)
        np.subtract(self._goal_position, self._position, out=error[:3])
        error[3] = 0.5 * (turn[2, 1] - turn[1, 2])
        error[4] = 0.5 * (turn[0, 2] - turn[2, 0])
        error[5] = 0.5 * (turn[1, 0] - turn[0, 1])
        return error
