"""IsaacGymEnvs tasks: what we use of them, and how one is made. Not run on a real Isaac Gym yet; see `IsaacVecEnv`.

No torch is imported here, since `isaacgym` refuses to be imported after it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from flowsteer.sim.errors import SimError

if TYPE_CHECKING:
    from isaacgym import gymapi
    from torch import Tensor

    from flowsteer.sim.isaac_env import IsaacVecEnv

PREVIEW = "Isaac Gym Preview 4 comes from NVIDIA's site with binaries for Python 3.6 to 3.8"


class VecTask(Protocol):
    """What `IsaacVecEnv` uses of `isaacgymenvs.tasks.base.vec_task.VecTask`; B `num_envs`, Do `num_obs`, Da `num_acts`.

    Physics and buffers live on `device`; what `step` takes and returns on `rl_device`.
    """

    gym: gymapi.Gym
    sim: gymapi.Sim
    viewer: gymapi.Viewer | None
    rl_device: str
    dt: float
    control_freq_inv: int
    clip_obs: float
    max_episode_length: int
    obs_buf: Tensor
    """[B, Do] before it is clipped."""
    reset_buf: Tensor
    """[B], not 0 where the next `step` starts a new episode."""
    timeout_buf: Tensor
    """[B], not 0 where the episode has ended at its time limit."""
    progress_buf: Tensor
    """[B] int64, steps of the episode so far."""

    @property
    def num_envs(self) -> int:
        """B."""

    @property
    def num_obs(self) -> int:
        """Do."""

    @property
    def num_acts(self) -> int:
        """Da."""

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Any]]:
        """Actions [B, Da] in [-1, 1] -> {"obs": [B, Do]}, rewards [B], resets [B], extras."""

    def reset_idx(self, env_ids: Tensor) -> None:
        """Put the environments `env_ids` [n] at the start of an episode; observations follow with the next ones."""

    def post_physics_step(self) -> None:
        """The half of `step` after the physics: count the step, compute `obs_buf`, rewards and resets."""


def destroy(task: VecTask) -> None:
    """Free the simulation and its window."""
    if task.viewer is not None:
        task.gym.destroy_viewer(task.viewer)
    task.gym.destroy_sim(task.sim)


def isaac(
    task_name: str,
    num_envs: int,
    observation_steps: int,
    *,
    device: str = "cuda:0",
    headless: bool = True,
    seed: int = 0,
    success: Callable[[Any], Tensor] | None = None,
) -> IsaacVecEnv:
    """The task `task_name` of IsaacGymEnvs.

    Call it before anything has imported torch, or make `import isaacgym` the first line of the script.

    Args:
        task_name: as in IsaacGymEnvs, "Ant" for example.
        num_envs: B.
        observation_steps: To.
        device: of the physics and of the tensors.
        headless: without a window.
        seed: of all random numbers of the simulation.
        success: see `IsaacVecEnv`.

    Raises:
        SimError: torch came first, or a package is missing or does not fit this Python.
    """
    if "torch" in sys.modules and "isaacgym" not in sys.modules:
        raise SimError("torch was imported before isaacgym: make 'import isaacgym' the first line of the script")
    _import("isaacgym", PREVIEW)
    make = _import("isaacgymenvs", "install IsaacGymEnvs from its repository").make
    graphics = -1 if headless or ":" not in device else int(device.rpartition(":")[2])
    task = make(seed, task_name, num_envs, device, device, graphics_device_id=graphics, headless=headless)
    # Not at the top: it imports torch.
    from flowsteer.sim.isaac_env import IsaacVecEnv

    return IsaacVecEnv(task, task_name, observation_steps, success)


def _import(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # The binaries of another Python show as RuntimeError, ImportError or OSError.
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SimError(f"'{name}' cannot be imported here ({told}): {remedy}") from error
