"""What an iteration collects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from flowsteer.rl_finetune.algorithm import Algorithm, Memory
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.sim.vec_env import Observation, StepResult, VecEnv


@final
@dataclass(frozen=True)
class Rollout:
    """S decisions of each of N environments, every tensor [S, N, ...] where nothing else is said.

    A chunk leads to the observation of the next decision, but where an episode ended it led to one of E others.

    obs: before the chunk.
    features: the same, encoded by the policy that collected [S, N, To, F].
    ended_obs: the true last observations [E, To, ...] of the episodes that ended, in the order of `ended.nonzero()`.
    next_obs: that the last decisions led to [N, To, ...], as far as their episodes go on.
    memory: the algorithm's.
    reward: sum over the chunk.
    terminated: the episode ended by the task's rule; `ended`: for whatever reason.
    kept: false where the simulator lost the episode: such a decision teaches nothing.
    """

    obs: Observation
    features: Tensor
    ended_obs: Observation
    next_obs: Observation
    memory: Memory
    reward: Tensor
    terminated: Tensor
    ended: Tensor
    kept: Tensor

    @property
    def flat_memory(self) -> Memory:
        """[S * N, ...]."""
        return {name: value.flatten(0, 1) for name, value in self.memory.items()}


@final
class Episodes:
    """Success and return of the episodes that end while collecting.

    Args:
        num_envs: N.
        device: of the results.
    """

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self._return = torch.zeros(num_envs, device=device)
        self._success = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._ended: list[Tensor] = []

    def add(self, result: StepResult) -> None:
        """Take in a chunk."""
        self._return = self._return + result.reward_sum
        self._success = self._success | result.info["success"]
        counts = result.ended & ~result.info["lost"]
        self._ended.append(torch.stack([self._return, self._success, counts], 1))
        self._return = self._return * ~result.ended
        self._success = self._success & ~result.ended

    def numbers(self) -> dict[str, float]:
        """Means over the episodes that have ended since the last call; nothing where none has."""
        seen, self._ended = torch.cat(self._ended), []
        ended = seen[seen[:, 2].bool()]
        if not len(ended):
            return {}
        return {"collect/return": ended[:, 0].mean().item(), "collect/success": ended[:, 1].mean().item()}


@torch.no_grad()
def collect(
    algorithm: Algorithm,
    env: VecEnv,
    obs: Observation,
    decisions: int,
    generator: torch.Generator,
    episodes: Episodes,
) -> tuple[Rollout, int]:
    """Make `decisions` decisions in every environment, from `obs` on.

    Returns:
        The rollout and the number of env steps; `rollout.next_obs` is where to go on from.

    Raises:
        FinetuneError: an observation or reward is not finite; names the environment and the seed of its episode.
    """
    observed, encoded, ended_obs, memories, results = [], [], [], [], []
    _check_finite((obs, lambda: env.seeds))
    for _ in range(decisions):
        features = algorithm.policy.features(obs)
        explored = algorithm.explore(obs, features, generator)
        result = env.step_chunk(explored.actions)
        led_to = {"reward": result.reward_sum, **result.final_obs}
        _check_finite((led_to, result.info["seed"].tolist), (result.obs, lambda: env.seeds))
        observed.append(obs)
        encoded.append(features)
        ended_obs.append({key: value[result.ended] for key, value in result.final_obs.items()})
        memories.append(explored.memory)
        results.append(result)
        episodes.add(result)
        obs = result.obs
    rollout = Rollout(
        _joined(observed, torch.stack),
        torch.stack(encoded),
        _joined(ended_obs, torch.cat),
        obs,
        _joined(memories, torch.stack),
        torch.stack([result.reward_sum for result in results]),
        torch.stack([result.terminated for result in results]),
        torch.stack([result.ended for result in results]),
        torch.stack([~result.info["lost"] for result in results]),
    )
    return rollout, int(torch.stack([result.info["env_steps"] for result in results]).sum())


def _joined(steps: list[dict[str, Tensor]], join: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    return {name: join([step[name] for step in steps]) for name in steps[0]}


def _check_finite(*groups: tuple[Mapping[str, Tensor], Callable[[], Sequence[int]]]) -> None:
    """Of environments [N], each group with its episodes; what else loses an episode leaves no such number."""
    numbers = [
        (name, value, seeds) for arrays, seeds in groups for name, value in arrays.items() if value.is_floating_point()
    ]
    # Sums instead of a mask of every element, and one question for all: they are not finite if any of them is not.
    if not numbers or bool(torch.stack([value.sum() for _, value, _ in numbers]).isfinite().all()):
        return
    for name, value, seeds in numbers:
        bad = ~value.reshape(len(value), -1).isfinite().all(1)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise FinetuneError(
                f"environment {i} gave a {name} that is not finite in the episode of seed {seeds()[i]}: "
                "mend the task; the last checkpoint is kept"
            )
