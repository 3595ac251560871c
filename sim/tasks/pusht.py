"""Push-T: push a T-shaped block onto its goal with a round finger (gym-pusht; Chi et al. 2023)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import Array, Arrays, DatasetKey, SingleEnv, Step, Task
from flowsteer.sim.tasks.pusht_state import (
    BLOCK_KEYPOINTS,
    BOARD,
    agent_in_block,
    continuous_pose,
    near_goal,
    recorded_state_keys,
)
from flowsteer.sim.tasks.pusht_symmetry import in_hindsight, mirrored

IMAGE = 96
SUBSTEPS = 10
SUBSTEP_S = 0.01
SUCCESS_COVERAGE = 0.95


def coverage_reward(before: Callable[[], Any], after: Any, xp: Any = np) -> Any:
    """gym-pusht's: coverage / 0.95, at most 1, of every step; evaluation reports it.

    Its sum grows with every step that a nearly solved episode goes on, so who learns from it learns not to finish.
    """
    return xp.clip(after / SUCCESS_COVERAGE, 0.0, 1.0)


def progress_reward(before: Callable[[], Any], after: Any, xp: Any = np) -> Any:
    """To learn from: what the step has gained of coverage / 0.95, and 1 more when it solves the task.

    Its sum is the coverage at the end less that at the start, however long it took.
    """
    gained = xp.clip(after / SUCCESS_COVERAGE, 0.0, 1.0) - xp.clip(before() / SUCCESS_COVERAGE, 0.0, 1.0)
    return gained + xp.where(after > SUCCESS_COVERAGE, 1.0, 0.0)


REWARDS: dict[str, Callable[..., Any]] = {"coverage": coverage_reward, "progress": progress_reward}
"""What asks for the coverage before the step, the coverage after it, array library -> reward."""


def find_reward(task: str, name: str) -> Callable[..., Any]:
    """The reward `name` of Push-T.

    Raises:
        SimError: there is none.
    """
    if name not in REWARDS:
        raise SimError(f"{task}: reward '{name}' is unknown, choose one of {sorted(REWARDS)}")
    return REWARDS[name]


@final
class PushTEnv(SingleEnv):
    """gym-pusht's scene, physics, reward and reset, stepped without its per-substep array arithmetic.

    The same numbers as `gym_pusht.envs.PushTEnv` at more than twice the rate: the finger's controller runs on
    plain floats and the coverage is computed only where the block has moved, against a goal built once.
    """

    def __init__(self, observation: str, reward: str) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self._shapely = optional_module("shapely", "pusht")
        self._scene = optional_module("gym_pusht.envs.pusht", "pusht").PushTEnv(
            observation_width=IMAGE, observation_height=IMAGE
        )
        self._scene._setup()
        self._outline = np.array([shape.get_vertices() for shape in self._scene._block_shapes], dtype=float)
        self._goal = self._polygon(*self._scene.goal_pose)
        self._goal_area = self._goal.area
        self._covered: tuple[tuple[float, float, float], float] = ((math.inf, math.inf, math.inf), 0.0)
        self._observe, self._reward = OBSERVATIONS[observation][1], REWARDS[reward]

    def reset(self, seed: int) -> Arrays:
        """Start as gym-pusht does: finger, block position and block angle uniform on the board."""
        self._scene.reset(seed=seed)
        return self._observe(self)

    def set_state(self, state: Array) -> Arrays:
        """Start from a recorded state [5]: finger x, y, block x, y, angle; returns the observation.

        The angle goes first: turning the block turns it about its centre of mass and moves its origin, so that
        gym-pusht's own `reset_to_state` (position first) does not restore the state it is given.
        """
        self._scene._setup()
        self._scene.agent.position = float(state[0]), float(state[1])
        self._scene.block.angle = float(state[4])
        self._scene.block.position = float(state[2]), float(state[3])
        self._scene.space.step(SUBSTEP_S)
        return self._observe(self)

    def step(self, action: Array) -> Step:
        """Pull the finger towards the target position action [2] for 0.1 s."""
        before = self.coverage()
        self._push(float(action[0]), float(action[1]))
        coverage = self.coverage()
        success = coverage > SUCCESS_COVERAGE
        return Step(self._observe(self), float(self._reward(lambda: before, coverage)), success, success)

    def coverage(self) -> float:
        """The share of the goal that the block covers now, in [0, 1]."""
        pose = self.block_pose()
        if pose != self._covered[0]:
            overlap = self._shapely.intersection(self._goal, self._polygon(*pose))
            self._covered = pose, float(overlap.area / self._goal_area)
        return self._covered[1]

    def agent_position(self) -> tuple[float, float]:
        """The finger's centre in pixels."""
        x, y = self._scene.agent.position
        return x, y

    def block_pose(self) -> tuple[float, float, float]:
        """The block's origin (middle of its bar's outer edge) in pixels and its angle in radians, not wrapped."""
        block = self._scene.block
        x, y = block.position
        return x, y, block.angle

    def render(self) -> NDArray[np.uint8]:
        """The board, one pixel per unit."""
        return self._picture(BOARD)

    def image(self) -> NDArray[np.uint8]:
        """The board as the demonstrations recorded it, [96, 96, 3]."""
        return self._picture(IMAGE)

    def project(self, actions: Array) -> NDArray[np.float64]:
        """Actions are already positions in pixels of `render`."""
        return np.asarray(actions, dtype=np.float64)

    def close(self) -> None:
        """Nothing outlives this object."""

    def _push(self, target_x: float, target_y: float) -> None:
        agent, space = self._scene.agent, self._scene.space
        k_p, k_v = self._scene.k_p, self._scene.k_v
        for _ in range(SUBSTEPS):
            x, y = agent.position
            vx, vy = agent.velocity
            acceleration_x = k_p * (target_x - x) + k_v * (0 - vx)
            acceleration_y = k_p * (target_y - y) + k_v * (0 - vy)
            agent.velocity = vx + acceleration_x * SUBSTEP_S, vy + acceleration_y * SUBSTEP_S
            space.step(SUBSTEP_S)

    def _polygon(self, x: float, y: float, angle: float) -> Any:
        cos, sin = math.cos(angle), math.sin(angle)
        corners = self._outline @ np.array([[cos, sin], [-sin, cos]]) + [x, y]
        return self._shapely.multipolygons(self._shapely.polygons(corners))

    def _picture(self, side: int) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self._scene._get_img(self._scene._draw(), width=side, height=side)
        return picture


def _state(env: PushTEnv) -> Arrays:
    return {**_agent_position(env), "block_pose": continuous_pose(np.array(env.block_pose()))}


def _features(env: PushTEnv) -> Arrays:
    state = np.array([*env.agent_position(), *env.block_pose()])
    return {**_state(env), "agent_in_block": agent_in_block(state), "near_goal": near_goal(state)}


def _agent_position(env: PushTEnv) -> Arrays:
    return {"agent_position": np.array(env.agent_position(), dtype=np.float32)}


def _keypoints(env: PushTEnv) -> Arrays:
    x, y, angle = env.block_pose()
    cos, sin = math.cos(angle), math.sin(angle)
    keypoints = BLOCK_KEYPOINTS @ np.array([[cos, sin], [-sin, cos]]) + [x, y]
    return {"keypoint": keypoints.astype(np.float32), **_agent_position(env)}


def _image(env: PushTEnv) -> Arrays:
    return {"image": env.image(), **_agent_position(env)}


_AGENT = ArraySpec((2,))

OBSERVATIONS: dict[str, tuple[dict[str, ArraySpec], Callable[[PushTEnv], Arrays]]] = {
    "state": ({"agent_position": _AGENT, "block_pose": ArraySpec((4,))}, _state),
    "features": (
        {
            "agent_position": _AGENT,
            "block_pose": ArraySpec((4,)),
            "agent_in_block": ArraySpec((2,)),
            "near_goal": ArraySpec((3,)),
        },
        _features,
    ),
    "keypoints": ({"keypoint": ArraySpec((9, 2)), "agent_position": _AGENT}, _keypoints),
    "image": ({"image": ArraySpec((IMAGE, IMAGE, 3), "uint8"), "agent_position": _AGENT}, _image),
}


@final
class PushT(Task):
    """Push the T onto the T: 10 Hz, at most 300 steps, done at a coverage above 0.95.

    Actions are target positions of the finger in pixels.

    Args:
        observation: "state" (the finger's position; the block's x, y and cos, sin of its angle), "features" (these, the
            finger in the block's frame and how near the goal the block is), "keypoints" (nine points of the block, as
            in the human demonstrations, and the finger's position) or "image" (96 x 96 as in the demonstrations, and
            the finger's position).
        reward: "coverage" (gym-pusht's) or "progress" (to learn from).
    """

    heavy: ClassVar[bool] = False
    training_options: ClassVar[Mapping[str, Any]] = {"reward": "progress"}

    def __init__(
        self,
        observation: Literal["state", "features", "keypoints", "image"] = "state",
        reward: Literal["coverage", "progress"] = "coverage",
    ) -> None:
        if observation not in OBSERVATIONS:
            raise SimError(f"pusht: observation '{observation}' is unknown, choose one of {sorted(OBSERVATIONS)}")
        find_reward("pusht", reward)
        self.observation, self.reward = observation, reward
        self.dataset_keys = {**recorded_state_keys(), "image": DatasetKey("img")}
        self.mirror = mirrored if observation != "keypoints" else None
        self.hindsight = in_hindsight if "block_pose" in OBSERVATIONS[observation][0] else None
        self.spec = TaskSpec(
            name="pusht" if observation == "state" else f"pusht_{observation}",
            observations=OBSERVATIONS[observation][0],
            action_dim=2,
            action_low=(0.0, 0.0),
            action_high=(float(BOARD), float(BOARD)),
            control_hz=10.0,
            max_episode_steps=300,
        )

    def make(self) -> PushTEnv:
        """One board."""
        return PushTEnv(self.observation, self.reward)
