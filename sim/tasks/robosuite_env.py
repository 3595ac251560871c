"""One robosuite world, stepped without what robosuite does for nobody.

Per env step robosuite updates every observable 25 times and runs its controller in Python; here the same physics is
stepped with `OscController`, and only the arrays of the spec are read, once, from the state that the step ended in.
Imports robosuite and MuJoCo, so tasks import this module in `make`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, final

import mujoco
import numba
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from flowsteer.sim.errors import SimError
from flowsteer.sim.tasks.base import Array, Arrays, SingleEnv, Step
from flowsteer.sim.tasks.offscreen import OffscreenRenderer, project
from flowsteer.sim.tasks.osc import OscController
from flowsteer.sim.tasks.robosuite_setup import RobosuiteSetup

Floats = NDArray[np.float64]

CUBE_HALF_SIZE = (0.020, 0.022)
"""Range of robosuite's lift cube, metres."""
CUBE_DENSITY = 1000.0
RENDER_CAMERA = "agentview"
RENDER_SIZE = 256


@contextmanager
def _plain_import() -> Iterator[None]:
    """Import robosuite without its side effects.

    numba would compile its helpers for 15 s on first use, none of which is called often here; `MUJOCO_GL=egl` left
    in the environment would break `import mujoco` in child processes where no EGL is installed; OpenCV, of which it
    wants a window that nobody opens, does not load where no libGL is installed; and it warns about optional parts.
    """
    config: Any = numba.config
    gl, jit = os.environ.get("MUJOCO_GL"), config.DISABLE_JIT
    config.DISABLE_JIT = True
    logging.disable(logging.WARNING)
    try:
        importlib.import_module("cv2")
    except ImportError:
        sys.modules["cv2"] = ModuleType("cv2")
    try:
        yield
    finally:
        if not hasattr(sys.modules["cv2"], "__version__"):
            del sys.modules["cv2"]
        logging.disable(logging.NOTSET)
        config.DISABLE_JIT = jit
        os.environ.pop("MUJOCO_GL", None)
        if gl is not None:
            os.environ["MUJOCO_GL"] = gl


with _plain_import():
    import robosuite

logging.getLogger("robosuite_logs").setLevel(logging.ERROR)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """robosuite draws from NumPy's global generator; the caller's stream is left as it was."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)


class Pose(NamedTuple):
    """Of a body: position [3] in metres, rotation matrix [3, 3], quaternion [4] x, y, z, w; all in the world."""

    position: Floats
    rotation: Floats
    quaternion: Floats


def _absolute(pose: Pose) -> tuple[Floats, Floats]:
    return pose.position, pose.quaternion


def _relative(pose: Pose, hand: Pose) -> tuple[Floats, Floats]:
    """Position and quaternion (w >= 0) of a pose in the axes of the hand."""
    turn = hand.rotation.T @ pose.rotation
    return hand.rotation.T @ (pose.position - hand.position), Rotation.from_matrix(turn).as_quat(canonical=True)


# The arrays that make `object`, from the poses of hand and object now and of the object one step before.
# robosuite 1.5 turned the sign of the first and the order of the others, and reads the object's pose in the hand's
# axes before it updates the object's pose, so that it is one step late there.
ObjectState = Callable[[Pose, Pose, Pose], tuple[Floats, ...]]
OBJECT_STATES: dict[tuple[str, str], ObjectState] = {
    ("Lift", "1.4"): lambda hand, now, before: (*_absolute(now), hand.position - now.position),
    ("Lift", "1.5"): lambda hand, now, before: (*_absolute(now), now.position - hand.position),
    ("PickPlaceCan", "1.4"): lambda hand, now, before: (*_absolute(now), *_relative(now, hand)),
    ("PickPlaceCan", "1.5"): lambda hand, now, before: (*_relative(before, hand), *_absolute(now)),
    ("NutAssemblySquare", "1.4"): lambda hand, now, before: (*_absolute(now), *_relative(now, hand)),
    ("NutAssemblySquare", "1.5"): lambda hand, now, before: (*_relative(before, hand), *_absolute(now)),
}


@final
class RobosuiteEnv(SingleEnv):
    """A Panda arm in one of robosuite's worlds; observations carry robomimic's names."""

    def __init__(self, setup: RobosuiteSetup) -> None:
        self._setup = setup
        with _seeded(0):
            self._env: Any = robosuite.make(
                setup.world.env_name,
                robots="Panda",
                controller_configs=setup.gains.to_robosuite(),
                control_freq=setup.control_hz,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                ignore_done=True,
                hard_reset=False,
            )
        self._model: mujoco.MjModel = self._env.sim.model._model
        self._data: mujoco.MjData = self._env.sim.data._data
        # Nothing reads the wrist's force sensor, which costs a tenth of the physics.
        self._model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self._substeps = int(self._env.control_timestep / self._env.model_timestep)
        self._renderer: OffscreenRenderer | None = None
        self._find_parts()

    def reset(self, seed: int) -> Arrays:
        """Joint angles, object pose and (lift) cube size drawn as robosuite does, from `seed` alone."""
        with _seeded(seed):
            if self._setup.world.env_name == "Lift":
                self._resize_cube(np.random.uniform(*CUBE_HALF_SIZE, 3))
            self._env.reset()
        self._start()
        return self._observe()

    def set_state(self, state: Array) -> Arrays:
        """Go on from a recorded MuJoCo state [1 + nq + nv] (time, qpos, qvel), of 1.4 too; what is seen there.

        Raises:
            SimError: the state is of another world.
        """
        width = 1 + self._model.nq + self._model.nv
        if state.shape != (width,):
            raise SimError(f"{self._setup.world.name}: a state has {width} numbers, got {list(state.shape)}")
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()
        self._start()
        return self._observe()

    def step(self, action: Array) -> Step:
        """Execute one action [7]: six of the delta pose in [-1, 1], and the gripper (sign: -1 opens, 1 closes)."""
        model, data = self._model, self._data
        mujoco.mj_step1(model, data)
        self._osc.set_goal(np.asarray(action[:6], dtype=np.float64))
        data.ctrl[self._gripper_motors] = self._gripper_ctrl(action[6:])
        for i in range(self._substeps):
            if i:
                mujoco.mj_step1(model, data)
            self._osc.apply()
            mujoco.mj_step2(model, data)
        self._update_kinematics()
        success = bool(self._env._check_success())
        return Step(self._observe(), float(success), success, success)

    def render(self) -> NDArray[np.uint8]:
        """The view of the camera `agentview`, [256, 256, 3]."""
        return self._view(RENDER_CAMERA, RENDER_SIZE)

    def project(self, actions: Array) -> NDArray[np.float64]:
        """The way of the fingertips under the actions, were nothing in the way."""
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(self._model, self._data, mujoco.mjtObj.mjOBJ_SITE, self._grip_site, velocity, 0)
        actions = np.asarray(actions, dtype=np.float64)
        start = self._data.site_xpos[self._grip_site].copy()
        points = self._setup.gains.rollout(start, velocity[3:], actions, 1 / self._setup.control_hz)
        return project(self._model, self._data, RENDER_CAMERA, RENDER_SIZE, points)

    def close(self) -> None:
        """Free the simulation and the graphics buffers."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()

    def _find_parts(self) -> None:
        robot, model = self._env.robots[0], self._model
        self._grip_site = int(robot.eef_site_id["right"])
        self._hand = model.body(robot.robot_model.eef_name["right"]).id
        self._object = model.body(self._setup.world.object_body).id
        self._gripper = robot.gripper["right"]
        self._gripper_joints = np.array(robot._ref_gripper_joint_pos_indexes["right"])
        self._gripper_motors = np.array(robot._ref_actuators_indexes_dict["right_gripper"])
        self._object_state = OBJECT_STATES[self._setup.world.env_name, self._setup.object_layout]

    def _start(self) -> None:
        self._update_kinematics()
        base = self._data.body(self._env.robots[0].robot_model.root_body).xmat.reshape(3, 3).copy()
        arm = slice(0, 7)
        self._osc = OscController(self._model, self._data, self._setup.gains, self._grip_site, base, arm, arm)
        self._object_before = self._pose(self._object)

    def _update_kinematics(self) -> None:
        """Bring positions up to the state that the last substep ended in; changes nothing that physics reads."""
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def _gripper_ctrl(self, action: Array) -> Floats:
        low, high = self._model.actuator_ctrlrange[self._gripper_motors].T
        ctrl: Floats = 0.5 * (low + high) + 0.5 * (high - low) * self._gripper.format_action(action)
        return ctrl

    def _pose(self, body: int) -> Pose:
        data = self._data
        quaternion = data.xquat[body][[1, 2, 3, 0]]
        return Pose(data.xpos[body].copy(), data.xmat[body].reshape(3, 3).copy(), quaternion)

    def _observe(self) -> Arrays:
        observation = {
            "robot0_eef_pos": self._data.site_xpos[self._grip_site],
            "robot0_eef_quat": self._data.xquat[self._hand][[1, 2, 3, 0]],
            "robot0_gripper_qpos": self._data.qpos[self._gripper_joints],
        }
        if not self._setup.cameras:
            observation["object"] = self._object_numbers()
        arrays: Arrays = {key: value.astype(np.float32) for key, value in observation.items()}
        return arrays | {
            f"{camera}_image": self._view(camera, self._setup.image_size) for camera in self._setup.cameras
        }

    def _object_numbers(self) -> Floats:
        # Fingertips for the position, the hand's body for the axes: so did robosuite up to 1.5, and so are the data.
        hand = self._pose(self._hand)._replace(position=self._data.site_xpos[self._grip_site].copy())
        now = self._pose(self._object)
        numbers = np.concatenate(self._object_state(hand, now, self._object_before))
        self._object_before = now
        return numbers

    def _view(self, camera: str, size: int) -> NDArray[np.uint8]:
        if self._renderer is None:
            # robosuite keeps collision shapes in geom group 0 and what is meant to be seen in group 1.
            largest = max(RENDER_SIZE, self._setup.image_size)
            self._renderer = OffscreenRenderer(self._model, largest, hidden_groups=[0])
        return self._renderer.render(self._data, camera, size)

    def _resize_cube(self, half: Floats) -> None:
        """What robosuite compiles a whole new model for at each reset (0.2 s)."""
        model, body = self._model, self._object
        geoms = model.geom_bodyid == body
        model.geom_size[geoms] = half
        model.geom_rbound[geoms] = np.linalg.norm(half)
        model.geom_aabb[geoms, 3:] = half
        boxes = slice(model.body_bvhadr[body], model.body_bvhadr[body] + model.body_bvhnum[body])
        model.bvh_aabb[boxes, 3:] = half
        model.body_mass[body] = CUBE_DENSITY * 8 * half.prod()
        model.body_inertia[body] = model.body_mass[body] / 3 * ((half**2).sum() - half**2)
        mujoco.mj_setConst(model, self._data)
        # The size also says how high above the table robosuite puts the cube.
        self._env.cube.size = half
