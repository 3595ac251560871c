"""Gymnasium's planar runners, version 5. They have no notion of success: judge them by the return."""

from __future__ import annotations

import math
import os
from abc import ABC
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.errors import optional_module
from flowsteer.sim.tasks.gymnasium_env import MINARI_KEYS, state_spec
from flowsteer.sim.tasks.mujoco_task import Batch, Judgement, MujocoTask, State, Xp, load_mjcf


class Runner(MujocoTask, ABC):
    """Runs along x in a plane: qpos is x, z, angle of the torso, joints; actions are joint torques in [-1, 1]."""

    dataset_keys = MINARI_KEYS
    camera = "track"
    file: ClassVar[str]
    """In Gymnasium's assets."""
    start: ClassVar[tuple[float, ...]]
    """qpos before the noise."""
    start_noise: ClassVar[float]
    control_cost: ClassVar[float]

    @final
    def load(self) -> Any:
        """Gymnasium's file."""
        assets = os.path.dirname(optional_module("gymnasium.envs.mujoco", "mujoco").__file__)
        return load_mjcf(os.path.join(assets, "assets", self.file))

    @final
    def control(self, xp: Xp, actions: Batch) -> Batch:
        """Torques."""
        return actions

    @final
    def _never(self, xp: Xp, state: State) -> Batch:
        return xp.zeros_like(state.qpos[..., 0], dtype=bool)

    @final
    def _forward(self, xp: Xp, before: State, actions: Batch, after: State) -> Batch:
        """Speed of the torso along x, less the cost of the torques."""
        speed = (after.qpos[..., 0] - before.qpos[..., 0]) * self.spec.control_hz
        return speed - self.control_cost * xp.sum(actions**2, axis=-1)


class Walker(Runner, ABC):
    """Falls, and is paid for not falling."""

    height: ClassVar[tuple[float, float]]
    angle: ClassVar[float]
    bound: ClassVar[float]
    """Of every other position and of the velocities."""

    @final
    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Uniform noise on positions and velocities, in Gymnasium's order."""
        return rng.random(2 * len(self.start))

    @final
    def initial(self, xp: Xp, draws: Batch) -> tuple[Batch, Batch]:
        """Upright and at rest, but for the noise."""
        noise = -self.start_noise + 2 * self.start_noise * draws
        qpos, qvel = noise[..., : len(self.start)], noise[..., len(self.start) :]
        return qpos + xp.asarray(self.start, dtype=draws.dtype, device=draws.device), qvel

    @final
    def observe(self, xp: Xp, state: State) -> dict[str, Batch]:
        """Positions without x, velocities within 10."""
        return {"state": xp.concat([state.qpos[..., 1:], xp.clip(state.qvel, -10, 10)], axis=-1)}

    @final
    def judge(self, xp: Xp, before: State, actions: Batch, after: State) -> Judgement:
        """Speed less cost, plus 1 while it stands; over when it has fallen."""
        fallen = self._fallen(xp, after)
        reward = self._forward(xp, before, actions, after) + xp.where(fallen, 0.0, 1.0)
        return Judgement(reward, fallen, self._never(xp, after))

    @final
    def _fallen(self, xp: Xp, state: State) -> Batch:
        z, angle = state.qpos[..., 1], state.qpos[..., 2]
        standing = (self.height[0] < z) & (z < self.height[1]) & (xp.abs(angle) < self.angle)
        joints = xp.concat([state.qpos[..., 2:], state.qvel], axis=-1)
        return ~(standing & xp.all(xp.abs(joints) < self.bound, axis=-1))


@final
class Hopper(Walker):
    """One leg, 3 joint torques, 125 Hz; ends when it falls."""

    spec = state_spec("hopper", state_dim=11, action_dim=3, control_hz=125.0, max_episode_steps=1000)
    file, frame_skip = "hopper.xml", 4
    start, start_noise, control_cost = (0.0, 1.25, 0.0, 0.0, 0.0, 0.0), 5e-3, 1e-3
    height, angle, bound = (0.7, math.inf), 0.2, 100.0


@final
class Walker2d(Walker):
    """Two legs, 6 joint torques, 125 Hz; ends when it falls."""

    spec = state_spec("walker2d", state_dim=17, action_dim=6, control_hz=125.0, max_episode_steps=1000)
    file, frame_skip = "walker2d_v5.xml", 4
    start, start_noise, control_cost = (0.0, 1.25, *(7 * (0.0,))), 5e-3, 1e-3
    height, angle, bound = (0.8, 2.0), 1.0, math.inf


@final
class HalfCheetah(Runner):
    """Two legs that cannot fall, 6 joint torques, 20 Hz."""

    spec = state_spec("halfcheetah", state_dim=17, action_dim=6, control_hz=20.0, max_episode_steps=1000)
    file, frame_skip = "half_cheetah.xml", 5
    start, start_noise, control_cost = 9 * (0.0,), 0.1, 0.1

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Uniform noise on positions, normal on velocities, in Gymnasium's order."""
        return np.concatenate([rng.random(9), rng.standard_normal(9)])

    def initial(self, xp: Xp, draws: Batch) -> tuple[Batch, Batch]:
        """At rest, but for the noise."""
        return -self.start_noise + 2 * self.start_noise * draws[..., :9], self.start_noise * draws[..., 9:]

    def observe(self, xp: Xp, state: State) -> dict[str, Batch]:
        """Positions without x, velocities."""
        return {"state": xp.concat([state.qpos[..., 1:], state.qvel], axis=-1)}

    def judge(self, xp: Xp, before: State, actions: Batch, after: State) -> Judgement:
        """Speed less cost; never over."""
        never = self._never(xp, after)
        return Judgement(self._forward(xp, before, actions, after), never, never)
