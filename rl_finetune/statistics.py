"""The normaliser of a policy that has seen no demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from flowsteer.policies.policy import ACTION, Policy
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.sim.vec_env import VecEnv

DECISIONS = 50
"""Of each environment, with random actions."""


@final
@dataclass(frozen=True)
class Statistics:
    """Of one key, each as long as its channels."""

    min: NDArray[np.float64]
    max: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @classmethod
    def of(cls, rows: NDArray[np.float64]) -> Statistics:
        """Over the rows [N, C]."""
        return cls(rows.min(0), rows.max(0), rows.mean(0), rows.std(0))


def fit_to_random_actions(policy: Policy, env: VecEnv, first_seed: int) -> None:
    """Fit the normaliser: actions to the task's limits, observations to what random actions lead to.

    Args:
        policy: its normaliser knows nothing yet.
        env: N environments; they are left in the middle of an episode.
        first_seed: of the N or more episodes.

    Raises:
        FinetuneError: the policy's actions are relative.
    """
    if policy.relative_to is not None:
        raise FinetuneError("policy.relative_to needs demonstrations, which say how far actions lead: set it to null")
    generator = torch.Generator().manual_seed(first_seed)
    low, high = (torch.tensor(limit, dtype=torch.float32) for limit in (env.spec.action_low, env.spec.action_high))
    obs = env.reset(iter(range(first_seed, first_seed + env.num_envs * DECISIONS)))
    seen = {key: [value] for key, value in obs.items() if value.dtype.is_floating_point}
    shape = (env.num_envs, policy.spec.execution_steps, policy.spec.action_dim)
    for _ in range(DECISIONS):
        result = env.step_chunk((low + (high - low) * torch.rand(shape, generator=generator)).to(env.device))
        for key, values in seen.items():
            values.append(result.obs[key])
    rows = {key: torch.cat(values).flatten(0, 1).flatten(1).double().cpu().numpy() for key, values in seen.items()}
    limits = torch.stack([low, high]).double().numpy()
    policy.fit_normalizer({**{key: Statistics.of(value) for key, value in rows.items()}, ACTION: Statistics.of(limits)})
