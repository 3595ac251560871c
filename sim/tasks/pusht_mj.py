"""Push-T in MuJoCo: gym-pusht's board, T, goal and finger, for any back end that runs MuJoCo tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import Array
from flowsteer.sim.tasks.gymnasium_env import RENDER_SIZE
from flowsteer.sim.tasks.mujoco_task import Batch, Judgement, MujocoTask, State, Xp, load_mjcf
from flowsteer.sim.tasks.pusht import REWARDS, SUCCESS_COVERAGE, find_reward
from flowsteer.sim.tasks.pusht_state import BOARD, GOAL, recorded_state_keys
from flowsteer.sim.tasks.pusht_symmetry import in_hindsight, mirrored
from flowsteer.sim.tasks.tee import coverage

PIXELS = 100.0
"""In one unit of length of the model."""
MASS_CENTRE = 45.0
"""From the block's origin (the middle of the bar's outer edge), pixels."""


@final
class PushTMujoco(MujocoTask):
    """Push the T onto the T, from state: 10 Hz, at most 300 steps, done at a coverage above 0.95.

    Actions, observations, reward and starts are those of `pusht`; an episode's seed gives the same start there.
    Positions are in pixels.

    Args:
        randomize: see `MujocoTask`.
        reward: "coverage" (gym-pusht's) or "progress" (to learn from).
    """

    training_options: ClassVar[Mapping[str, Any]] = {"reward": "progress"}

    def __init__(
        self,
        randomize: Mapping[str, Sequence[float]] | None = None,
        reward: Literal["coverage", "progress"] = "coverage",
    ) -> None:
        super().__init__(randomize)
        self.reward = reward
        find_reward("pusht_mj", reward)

    spec = TaskSpec(
        name="pusht_mj",
        observations={"agent_position": ArraySpec((2,)), "block_pose": ArraySpec((4,))},
        action_dim=2,
        action_low=(0.0, 0.0),
        action_high=(float(BOARD), float(BOARD)),
        control_hz=10.0,
        max_episode_steps=300,
    )
    dataset_keys = recorded_state_keys()
    mirror = staticmethod(mirrored)
    hindsight = staticmethod(in_hindsight)
    frame_skip = 10
    camera = "board"

    def load(self) -> Any:
        """`assets/pusht.xml`."""
        return load_mjcf(str(files("flowsteer.sim.tasks").joinpath("assets", "pusht.xml")))

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Finger x, y, block x, y, angle, as gym-pusht draws them."""
        places = [rng.integers(low, high) for low, high in ((50, 450), (50, 450), (100, 400), (100, 400))]
        return np.array([*places, rng.uniform(-math.pi, math.pi)])

    def initial(self, xp: Xp, draws: Batch) -> tuple[Batch, Batch]:
        """At rest. gym-pusht turns the block about its centre of mass after it has placed it."""
        finger, x, y, angle = draws[:, :2], draws[:, 2:3], draws[:, 3:4], draws[:, 4:]
        qpos = xp.concat([finger / PIXELS, x / PIXELS, (y + MASS_CENTRE) / PIXELS, angle], axis=1)
        return qpos, xp.zeros_like(qpos)

    def control(self, xp: Xp, actions: Batch) -> Batch:
        """Where the finger is pulled to."""
        return actions / PIXELS

    def observe(self, xp: Xp, state: State) -> dict[str, Batch]:
        """The finger's position; x, y and cos, sin of the block's angle."""
        return {
            "agent_position": PIXELS * state.qpos[..., :2],
            "block_pose": xp.stack(_block_pose(xp, state.qpos), axis=-1),
        }

    def judge(self, xp: Xp, before: State, actions: Batch, after: State) -> Judgement:
        """The task's reward; solved and over at a coverage above 0.95."""
        covered = _covered(xp, after)
        solved = covered > SUCCESS_COVERAGE
        return Judgement(REWARDS[self.reward](lambda: _covered(xp, before), covered, xp), solved, solved)

    def project(self, actions: Array) -> Array:
        """Pixels of the board to pixels of the picture."""
        return np.asarray(actions, np.float64) * (RENDER_SIZE / BOARD)


def _covered(xp: Xp, state: State) -> Batch:
    return coverage(xp, *_block_pose(xp, state.qpos), GOAL)


def _block_pose(xp: Xp, qpos: Batch) -> tuple[Batch, Batch, Batch, Batch]:
    """x, y (pixels) and cos, sin of the block's origin."""
    cos, sin = xp.cos(qpos[..., 4]), xp.sin(qpos[..., 4])
    return PIXELS * qpos[..., 2] + MASS_CENTRE * sin, PIXELS * qpos[..., 3] - MASS_CENTRE * cos, cos, sin
