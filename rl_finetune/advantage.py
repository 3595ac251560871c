"""Advantages of decisions, and the scale of their rewards.

Dimension letters used in this room:
S decisions of one environment in an iteration, N environments, R rows of an update,
B batch, To observation steps, Tp predicted steps, Ta executed steps, Da action width, K denoising steps, K' fine-tuned.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    kept: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016) of decisions, [S, N].

    The bootstrap and the trace are cut by different things. A terminated episode is worth nothing any more; a
    truncated one would have gone on, so it bootstraps from its true last observation. The trace ends with either.

    Args:
        reward: [S, N], summed over the chunk.
        value: [S, N], V of the observation that the decision was made on.
        next_value: [S, N], V of the true last observation of the chunk.
        terminated: [S, N] bool, the episode ended by the task's rule.
        ended: [S, N] bool, the episode ended for whatever reason.
        kept: [S, N] bool; where it is false the simulator lost the episode, and reward and next value may be anything:
            the advantage is 0, and so is what earlier decisions hear of it.
        gamma: discount of one decision.
        lam: lambda.
    """
    # TD error: r_t + gamma V(s_{t+1}) - V(s_t)
    delta = torch.where(kept, reward + gamma * next_value.where(~terminated, 0.0) - value, 0.0)
    decay = gamma * lam * ~(ended | ~kept)
    advantage, trace = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        # A_t = delta_t + gamma lambda A_{t+1}
        trace = delta[t] + decay[t] * trace
        advantage[t] = trace
    return advantage


@final
class RewardScale:
    """Divides rewards by the running standard deviation of the discounted return, without moving their mean.

    Args:
        gamma: the discount of the task itself.
        limit: scaled rewards are clipped to +-limit.
    """

    def __init__(self, gamma: float, limit: float = 10.0) -> None:
        self.gamma, self.limit = gamma, limit
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0
        self._running: Tensor | None = None

    def update(self, reward: Tensor, ended: Tensor) -> None:
        """Take in the rewards [S, N] of an iteration; `ended` [S, N] bool. Episodes go on in the next iteration."""
        returns = torch.empty_like(reward)
        running = torch.zeros_like(reward[0]) if self._running is None else self._running
        for t in range(len(reward)):
            running = reward[t] + self.gamma * running
            returns[t] = running
            running = running * ~ended[t]
        self._running = running
        self._merge(returns.double())

    def restart(self) -> None:
        """All environments start new episodes."""
        self._running = None

    def __call__(self, reward: Tensor) -> Tensor:
        """Rewards in units of that deviation."""
        return (reward / self.std).clamp(-self.limit, self.limit)

    @property
    def std(self) -> float:
        """By which rewards are divided: 1 while all returns were the same."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 if variance > 1e-12 else 1.0

    def _merge(self, values: Tensor) -> None:
        # Chan, Golub and LeVeque 1979: the exact merge of two sets' means and sums of squared deviations.
        count, mean = values.numel(), values.mean().item()
        shift, total = mean - self.mean, self.count + count
        self.squares += (values - mean).square().sum().item() + shift**2 * self.count * count / total
        self.mean, self.count = self.mean + shift * count / total, total

    def state_dict(self) -> dict[str, float]:
        """What has been seen, as plain JSON values."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go back to what `state_dict` told."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
