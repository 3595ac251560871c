"""Every back end whose observations are numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import final

import numpy as np
import torch
from torch import Tensor

from flowsteer.sim.actions import ActionCheck
from flowsteer.sim.errors import SimError
from flowsteer.sim.pool import Pool
from flowsteer.sim.slot import OUTCOME
from flowsteer.sim.spec import TaskSpec
from flowsteer.sim.tasks.base import Array
from flowsteer.sim.vec_env import IDLE, Observation, StepResult, VecEnv


@final
class PoolVecEnv(VecEnv):
    """The contract on top of a `Pool`: seeds, checks, tensors.

    Args:
        spec: of the task.
        pool: B environments that have not been started.
        num_envs: B.
        observation_steps: To.
        device: where tensors come out.
    """

    def __init__(
        self, spec: TaskSpec, pool: Pool, num_envs: int, observation_steps: int, device: torch.device | str = "cpu"
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self.observation_steps = observation_steps
        self.device = torch.device(device)
        self._check = ActionCheck(spec, num_envs, torch.device("cpu"))
        self._pool = pool
        self._next: Iterator[int] = iter(())
        self._seeds = [IDLE] * num_envs
        self._open = True

    @property
    def seeds(self) -> tuple[int, ...]:
        """See `VecEnv`."""
        return tuple(self._seeds)

    def reset(self, seeds: Iterable[int]) -> Observation:
        """See `VecEnv`."""
        self._check_open()
        self._next = iter(seeds)
        self._start(range(self.num_envs))
        return self._observation()

    def step_chunk(self, actions: Tensor) -> StepResult:
        """See `VecEnv`."""
        self._check_open()
        seeds = np.array(self._seeds, dtype=np.int64)
        checked = self._check(actions, torch.from_numpy(seeds != IDLE))
        self._check.refuse(bool(checked.hopeless))
        chunks, lost = checked.chunks.numpy(), checked.broken.numpy()
        active = np.flatnonzero((seeds != IDLE) & ~lost)
        outcomes = np.zeros(self.num_envs, dtype=OUTCOME)
        outcomes[active], gone = self._pool.run({i: chunks[i] for i in active.tolist()})
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
        self._open = False
        self._pool.close()

    def _check_open(self) -> None:
        if not self._open:
            raise SimError(f"{self.spec.name}: this environment is closed")

    def _start(self, indices: Iterable[int]) -> None:
        for i in indices:
            self._seeds[i] = next(self._next, IDLE)
        self._pool.start({i: self._seeds[i] for i in indices if self._seeds[i] != IDLE})

    def _observation(self) -> Observation:
        return {key: self._tensor(window.copy()) for key, window in self._pool.windows.items()}

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)
