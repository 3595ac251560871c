"""The back end for every task that is one environment in plain numpy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowsteer.sim.cores import usable_cores
from flowsteer.sim.errors import SimError
from flowsteer.sim.pool import LocalPool, Pool
from flowsteer.sim.slot import OUTCOME
from flowsteer.sim.tasks.base import Array, Task
from flowsteer.sim.vec_env import IDLE, Observation, StepResult, VecEnv
from flowsteer.sim.worker_pool import WorkerPool


def _pool(task: Task, num_envs: int, observation_steps: int, workers: int | None, timeout_s: float) -> Pool:
    if workers is None:
        workers = usable_cores() if task.heavy else 0
    if workers == 0:
        return LocalPool(task, num_envs, observation_steps)
    return WorkerPool(task, num_envs, observation_steps, workers, timeout_s)


@final
class GymVecEnv(VecEnv):
    """A batch of `task.make()` environments.

    Args:
        task: what to make.
        num_envs: B.
        observation_steps: To.
        workers: processes that the environments are dealt over; 0 keeps them in this one. By default 0 for cheap
            tasks and one per usable core for heavy ones. Episodes are the same either way.
        timeout_s: a worker that takes longer over one chunk or reset counts as crashed.
        device: where tensors come out.

    Raises:
        SimError: a size is not positive, or the simulator is not installed.
    """

    def __init__(
        self,
        task: Task,
        num_envs: int,
        observation_steps: int,
        *,
        workers: int | None = None,
        timeout_s: float = 120.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(num_envs, observation_steps) < 1:
            raise SimError(f"num_envs and observation_steps must be at least 1, got {num_envs} and {observation_steps}")
        self.task = task
        self.spec = task.spec
        self.num_envs = num_envs
        self.observation_steps = observation_steps
        self.device = torch.device(device)
        self._low = np.asarray(task.spec.action_low, dtype=np.float32)
        self._high = np.asarray(task.spec.action_high, dtype=np.float32)
        self._pool = _pool(task, num_envs, observation_steps, workers, timeout_s)
        self._next: Iterator[int] = iter(())
        self._seeds = [IDLE] * num_envs

    @property
    def seeds(self) -> tuple[int, ...]:
        """See `VecEnv`."""
        return tuple(self._seeds)

    def reset(self, seeds: Iterable[int]) -> Observation:
        """See `VecEnv`."""
        self._next = iter(seeds)
        self._start(range(self.num_envs))
        return self._observation()

    def step_chunk(self, actions: Tensor) -> StepResult:
        """See `VecEnv`."""
        seeds = np.array(self._seeds, dtype=np.int64)
        chunks = self._checked(actions)
        active = [i for i, seed in enumerate(self._seeds) if seed != IDLE]
        outcomes = np.zeros(self.num_envs, dtype=OUTCOME)
        lost = np.zeros(self.num_envs, dtype=np.bool_)
        outcomes[active], gone = self._pool.run({i: chunks[i] for i in active})
        lost[list(gone)] = True
        final_obs = self._observation()
        ended = np.flatnonzero(outcomes["terminated"] | outcomes["truncated"] | lost)
        if len(ended):
            self._start(ended.tolist())
        obs = self._observation() if len(ended) else final_obs
        arrays = {name: self._tensor(outcomes[name].copy()) for name in OUTCOME.names or ()}
        arrays |= {"seed": self._tensor(seeds), "active": self._tensor(seeds != IDLE), "lost": self._tensor(lost)}
        reward_sum, terminated, truncated = (arrays.pop(name) for name in ("reward_sum", "terminated", "truncated"))
        return StepResult(obs, reward_sum, terminated, truncated, final_obs, arrays)

    def close(self) -> None:
        """See `VecEnv`."""
        self._pool.close()

    def _start(self, indices: Iterable[int]) -> None:
        for i in indices:
            self._seeds[i] = next(self._next, IDLE)
        self._pool.start({i: self._seeds[i] for i in indices if self._seeds[i] != IDLE})

    def _checked(self, actions: Tensor) -> NDArray[np.float32]:
        """Actions as float32 within the limits."""
        wanted = (self.num_envs, actions.shape[1] if actions.ndim == 3 else 0, self.spec.action_dim)
        if actions.shape != wanted or actions.shape[1] < 1:
            raise SimError(
                f"{self.spec.name}: actions must be [{self.num_envs}, Ta, {self.spec.action_dim}], "
                f"got {list(actions.shape)}"
            )
        chunks = actions.detach().float().cpu().numpy()
        broken = ~np.isfinite(chunks).all(axis=(1, 2)) & (np.array(self._seeds) != IDLE)
        if broken.any():
            i = int(broken.argmax())
            raise SimError(
                f"{self.spec.name}: the actions of environment {i} (seed {self._seeds[i]}) are not finite; "
                "the policy has diverged or its normaliser is broken"
            )
        clipped: NDArray[np.float32] = np.clip(chunks, self._low, self._high)
        return clipped

    def _observation(self) -> Observation:
        return {key: self._tensor(window.copy()) for key, window in self._pool.windows.items()}

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)
