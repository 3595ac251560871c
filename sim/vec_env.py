"""The one contract of every simulation back end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, final

import torch
from torch import Tensor

from flowsteer.sim.spec import TaskSpec as TaskSpec

Observation = dict[str, Tensor]

IDLE = -1
"""In `VecEnv.seeds`: no episode runs, since the seeds have run out."""


@final
@dataclass(frozen=True)
class StepResult:
    """What one chunk did in each of B environments.

    obs, final_obs: [B, To, ...]; `final_obs` is the true last observation of this chunk; `obs` equals it,
        except where an episode ended: there it is the first observation of the next episode.
    reward_sum: [B] sum of the rewards of the executed steps, up to and including the last of the episode.
    terminated, truncated: [B] bool; the episode ended inside this chunk by the task's rule / by its time limit.
        Never both: where the last permitted step also ends by rule, it is terminated.
    info: tensors [B]: `env_steps` (int64, executed steps), `reward_max` (float32, largest step reward),
        `success` (bool, the task's success held at some executed step), `seed` (int64, of the episode that the
        chunk belonged to), `active` (bool, false where an idle environment did nothing), `lost` (bool: the
        worker died, the world blew up, or its actions, rewards or observations were not finite; the episode
        counts for nothing, its observations here are not of that episode's end). Only the task's own faults
        leave numbers here that are not finite: in `reward_sum` or `final_obs` of a lost episode.
    """

    obs: Observation
    reward_sum: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Observation
    info: dict[str, Tensor]

    @property
    def ended(self) -> Tensor:
        """[B] bool: the episode is over, for whatever reason."""
        return self.terminated | self.truncated | self.info["lost"]


class VecEnv(ABC):
    """B environments of one task, stepped in chunks; a context manager that closes itself.

    Tensors in and out live on `device`. Observations hold the last To steps; at an episode's start the first
    observation is repeated. A finished environment starts its next episode by itself with the next seed (where
    several finish in one chunk, in order of the environments); when the seeds run out it stays idle.
    """

    spec: TaskSpec
    num_envs: int
    observation_steps: int
    device: torch.device

    @property
    @abstractmethod
    def seeds(self) -> tuple[int, ...]:
        """The seed of each environment's running episode, `IDLE` where none runs; B long."""

    @abstractmethod
    def reset(self, seeds: Iterable[int]) -> Observation:
        """Start B episodes with the first B seeds (in order of the environments); later episodes take the next ones.

        An endless iterable (`itertools.count`) serves training, a range of n seeds runs exactly n episodes.
        """

    @abstractmethod
    def step_chunk(self, actions: Tensor) -> StepResult:
        """Execute actions [B, Ta, Da] open loop; each environment stops at its episode's end.

        Rows of idle environments are ignored. Actions are clipped to the limits of the spec. Where they are not
        finite, that environment's episode is lost.

        Raises:
            SimError: wrong shape, or no running environment has finite actions; nothing was stepped.
        """

    @abstractmethod
    def close(self) -> None:
        """Free every process, file and GPU buffer; safe to call twice."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
