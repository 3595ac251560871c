"""A unimodal policy: the baseline that multimodal ones are compared with, and the policy of plain PPO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.base import EncoderFactory
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.mlp import MLP
from flowsteer.policies.policy import Draws, Loss, Policy
from flowsteer.policies.samplers import Gaussian, Generators, start_noise
from flowsteer.policies.spec import PolicySpec


@final
class GaussianPolicy(Policy):
    """N(mean(obs), std^2) over the normalised chunk; the std is learned per action dimension, not per state.

    Args:
        spec: see `Policy`.
        encoder: see `Policy`.
        hidden: widths of the hidden layers.
        min_std: floor of the standard deviation, in normalised units.
        temperature: scale of the noise when sampling; 0 acts with the mean.
        normalizers, relative_to: see `Policy`.

    Raises:
        PolicyError: `min_std` is not positive or `temperature` is negative.
    """

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        hidden: Sequence[int] = (512, 512, 512),
        min_std: float = 0.01,
        temperature: float = 0.0,
        normalizers: Mapping[str, str] | None = None,
        relative_to: str | None = None,
    ) -> None:
        super().__init__(spec, encoder, normalizers, relative_to)
        if not min_std > 0:
            raise PolicyError(f"policy.min_std must be positive, got {min_std:g}")
        if not temperature >= 0:
            raise PolicyError(f"policy.temperature must not be negative, got {temperature:g}")
        self.chunk = (spec.prediction_steps, spec.action_dim)
        self.mean = MLP((spec.observation_steps * self.encoder.feature_dim, *hidden, math.prod(self.chunk)))
        self.log_std = nn.Parameter(torch.full((spec.action_dim,), -1.0))
        self.min_std, self.temperature = min_std, temperature

    def distribution(self, features: Tensor) -> Gaussian:
        """The Gaussian over normalised chunks given features [B, To, F]; mean [B, Tp, Da], std [Da]."""
        mean = self.mean(features.flatten(1)).unflatten(1, self.chunk).float()
        return Gaussian(mean, self.log_std.exp().clamp(min=self.min_std))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:  # noqa: D102
        return ()

    def _loss(self, features: Tensor, action: Tensor, draws: Draws) -> Loss:
        gaussian = self.distribution(features)
        total = -gaussian.log_prob(action).mean()
        error = (gaussian.mean - action).square().mean()
        return Loss(total, {"nll": total.detach(), "mse": error.detach()})

    def _sample(self, features: Tensor, noise: Tensor | None, generator: Generators) -> Tensor:
        gaussian = self.distribution(features)
        noise = start_noise(noise, gaussian.mean.shape, generator, features.device)
        return gaussian.mean + self.temperature * gaussian.std * noise
