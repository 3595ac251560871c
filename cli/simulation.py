"""Environments for an evaluation."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from flowsteer.sim.gym_env import GymVecEnv
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.vec_env import VecEnv

CHEAP_ENVS, HEAVY_ENVS = 50, 10
"""Environments in a batch, where nothing else is asked for: a heavy one takes seconds and 100 MB to make."""


def make_environments(
    task: Task, options: DictConfig, episodes: int, observation_steps: int, device: torch.device | str
) -> VecEnv:
    """A batch of environments of `task`, no more than there are episodes.

    Raises:
        SimError: the simulator is not installed.
    """
    num_envs = options.num_envs or (HEAVY_ENVS if task.heavy else CHEAP_ENVS)
    return GymVecEnv(task, min(num_envs, episodes), observation_steps, device=device)
