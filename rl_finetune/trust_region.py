"""What keeps an update near the policy that collected the data: clipped surrogates, clip schedules, KL estimates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Log-ratio, advantage and clip range, each broadcastable to [R] -> what to descend, [R]."""


def ppo_clip(log_ratio: Tensor, advantage: Tensor, clip: Tensor) -> Tensor:
    """PPO (Schulman et al. 2017, eq. 7): -min(r A, clip(r, 1 - eps, 1 + eps) A)."""
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def aspo(log_ratio: Tensor, advantage: Tensor, clip: Tensor) -> Tensor:
    """FPO++ (arXiv 2602.02481): PPO's clip where A > 0, else SPO's penalty -(r A - |A| (r - 1)^2 / (2 eps)).

    The penalty still pulls a ratio back that has left the trust region, where the clip's gradient is 0.
    """
    ratio = log_ratio.exp()
    spo = -(ratio * advantage - advantage.abs() * (ratio - 1).square() / (2 * clip))
    return torch.where(advantage > 0, ppo_clip(log_ratio, advantage, clip), spo)


SURROGATES: dict[str, Surrogate] = {"ppo": ppo_clip, "aspo": aspo}


def clip_schedule(first: float, last: float, steps: int, rate: float = 3.0) -> Tensor:
    """DPPO's clip range of each fine-tuned denoising step [K'], from the noisiest: `first` grows to `last`.

    eps_i = first + (last - first) (e^(rate t) - 1) / (e^rate - 1), t = i / (K' - 1); a single step has `last`.
    """
    t = torch.linspace(0, 1, steps) if steps > 1 else torch.ones(1)
    return first + (last - first) * torch.expm1(rate * t) / math.expm1(rate)


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """KL(old || new), the low-variance estimator (r - 1) - log r (Schulman 2020), mean over all."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def clamp_through(x: Tensor, low: float, high: float) -> Tensor:
    """`x` clamped, with the gradient of `x` itself (straight-through)."""
    return x + (x.clamp(low, high) - x).detach()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.flatten(1).mean(1),
    "sum": lambda x: x.flatten(1).sum(1),
    "sqrt": lambda x: x.flatten(1).sum(1) / math.sqrt(x[0].numel()),
}
"""Elementwise log-probabilities or losses [R, Ta, Da] -> [R]. A clip range means nothing without the reduction."""


def scale_of(reduce: Callable[[Tensor], Tensor], steps: int, action_dim: int) -> float:
    """What a reduction makes of ones."""
    return reduce(torch.ones(1, steps, action_dim)).item()
