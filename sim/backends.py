"""The back ends by name: how a task becomes a batch of environments."""

from __future__ import annotations

from typing import Protocol

import torch

from flowsteer.sim.cores import usable_cores
from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.pool import LocalPool, Pool
from flowsteer.sim.pool_env import PoolVecEnv
from flowsteer.sim.ray_pool import RayPool
from flowsteer.sim.rollout_pool import RolloutPool
from flowsteer.sim.tasks.base import Task
from flowsteer.sim.tasks.mujoco_task import MujocoTask
from flowsteer.sim.vec_env import VecEnv
from flowsteer.sim.worker_pool import WorkerPool


class Backend(Protocol):
    """Makes `num_envs` environments of `task` with `observation_steps` observed steps."""

    def __call__(
        self,
        task: Task,
        num_envs: int,
        observation_steps: int,
        *,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> VecEnv:
        """See the back ends.

        Raises:
            SimError: a size is not positive, a package is missing, or the task cannot run there.
        """


def gym(
    task: Task,
    num_envs: int,
    observation_steps: int,
    *,
    workers: int | None = None,
    timeout_s: float = 120.0,
    device: torch.device | str = "cpu",
) -> VecEnv:
    """A batch of `task.make()` environments, for every task.

    Args:
        task, num_envs, observation_steps, device: see `Backend`.
        workers: processes that the environments are dealt over; 0 keeps them in this one. By default 0 for cheap
            tasks and one per usable core for heavy ones. Episodes are the same either way.
        timeout_s: a worker that takes longer over one chunk or reset counts as crashed.
    """
    _check_sizes(num_envs, observation_steps, workers, least_workers=0)
    if workers is None:
        workers = usable_cores() if task.heavy else 0
    pool: Pool = (
        LocalPool(task, num_envs, observation_steps)
        if workers == 0
        else WorkerPool(task, num_envs, observation_steps, workers, timeout_s)
    )
    return PoolVecEnv(task.spec, pool, num_envs, observation_steps, device)


def threads(
    task: Task,
    num_envs: int,
    observation_steps: int,
    *,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> VecEnv:
    """MuJoCo worlds on `workers` threads, one per usable core when not given; for MuJoCo tasks."""
    _check_sizes(num_envs, observation_steps, workers)
    if not isinstance(task, MujocoTask):
        raise SimError(f"{task.spec.name}: only MuJoCo tasks run on threads; choose sim.backend=gym")
    pool = RolloutPool(task, num_envs, observation_steps, workers)
    return PoolVecEnv(task.spec, pool, num_envs, observation_steps, device)


def ray(
    task: Task,
    num_envs: int,
    observation_steps: int,
    *,
    workers: int | None = None,
    timeout_s: float = 120.0,
    device: torch.device | str = "cpu",
) -> VecEnv:
    """A batch dealt over `workers` Ray actors on one or many machines, for every task.

    Args:
        task, num_envs, observation_steps, device: see `Backend`.
        workers: actors of one CPU each, by default one per CPU of the cluster that RAY_ADDRESS names, or of this
            machine. Episodes are the same whatever their number.
        timeout_s: an actor that takes longer over one chunk or reset counts as crashed.
    """
    _check_sizes(num_envs, observation_steps, workers)
    pool = RayPool(task, num_envs, observation_steps, workers, timeout_s)
    return PoolVecEnv(task.spec, pool, num_envs, observation_steps, device)


def warp(
    task: Task,
    num_envs: int,
    observation_steps: int,
    *,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> VecEnv:
    """MuJoCo worlds in MuJoCo Warp, on `device`, where they pay from about a thousand on a GPU; for MuJoCo tasks."""
    _check_sizes(num_envs, observation_steps, workers)
    if not isinstance(task, MujocoTask):
        raise SimError(f"{task.spec.name}: only MuJoCo tasks run in MuJoCo Warp; choose sim.backend=gym")
    if workers is not None:
        raise SimError("sim.backend=warp has no workers: leave sim.workers out")
    for module in ("warp", "mujoco_warp"):
        optional_module(module, "warp")
    # Not at the top: that module imports Warp.
    from flowsteer.sim.warp_env import WarpVecEnv

    return WarpVecEnv(task, num_envs, observation_steps, device)


BACKENDS: dict[str, Backend] = {"gym": gym, "threads": threads, "ray": ray, "warp": warp}
ANY_TASK = frozenset({"gym", "ray"})
"""The others run MuJoCo tasks only."""


def suitable(task: Task) -> str:
    """The back end that is used when none is named."""
    return "threads" if isinstance(task, MujocoTask) else "gym"


def _check_sizes(num_envs: int, observation_steps: int, workers: int | None, least_workers: int = 1) -> None:
    sizes = {
        "num_envs": (num_envs, 1),
        "observation_steps": (observation_steps, 1),
        "workers": (workers, least_workers),
    }
    for name, (size, least) in sizes.items():
        if size is not None and size < least:
            raise SimError(f"{name} must be at least {least}, got {size}")
