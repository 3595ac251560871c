"""The one contract of every simulation back end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsteer.policies.spec import ArraySpec

Observation = dict[str, Tensor]


@dataclass(frozen=True)
class TaskSpec:
    """What a task offers: the arrays of one step, the action width, its rate and its episode limit (env steps).

    Actions are in the task's physical units, within `action_low` and `action_high` (each Da long).
    """

    name: str
    observations: Mapping[str, ArraySpec]
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    control_hz: float
    max_episode_steps: int


@dataclass(frozen=True)
class StepResult:
    """What one chunk did in each of B environments.

    obs, final_obs: [B, To, ...]; `final_obs` is the true last observation of this chunk; `obs` equals it,
        except where an episode ended: there it is the first observation of the next episode.
    reward_sum: [B] sum of the rewards of the executed steps, up to and including the last of the episode.
    terminated, truncated: [B] bool; the episode ended inside this chunk by the task's rule / by its time limit.
    info: tensors [B]: `env_steps` (int64, executed steps), `reward_max` (float32, largest step reward),
        `success` (bool, the task's success held at some executed step), `seed` (int64, of the episode that the
        chunk belonged to), `active` (bool, false where an idle environment did nothing), `lost` (bool, the
        worker died: the episode counts for nothing).
    """

    obs: Observation
    reward_sum: Tensor
    terminated: Tensor
    truncated: Tensor
    final_obs: Observation
    info: dict[str, Tensor]


class VecEnv(ABC):
    """B environments of one task, stepped in chunks.

    Tensors in and out live on `device`. Observations hold the last To steps; at an episode's start the first
    observation is repeated. A finished environment starts its next episode by itself with the next seed; when
    the seeds run out it stays idle.
    """

    spec: TaskSpec
    num_envs: int
    observation_steps: int
    device: torch.device

    @abstractmethod
    def reset(self, seeds: Iterable[int]) -> Observation:
        """Start B episodes with the first B seeds (in order of the environments); later episodes take the next ones.

        An endless iterable (`itertools.count`) serves training, a range of n seeds runs exactly n episodes.
        """

    @abstractmethod
    def step_chunk(self, actions: Tensor) -> StepResult:
        """Execute actions [B, Ta, Da] open loop; each environment stops at its episode's end."""

    @abstractmethod
    def close(self) -> None:
        """Free every process, file and GPU buffer; safe to call twice."""
