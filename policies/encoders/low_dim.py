"""Joint positions, poses, keypoints: everything that is a short vector of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.base import Encoder
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.mlp import MLP
from flowsteer.policies.spec import ArraySpec


@final
class LowDim(Encoder):
    """All keys flattened and concatenated in the order of the specs, optionally through a perceptron.

    Args:
        observations: float arrays of any shape.
        hidden: widths of the perceptron, the last is F; empty for the concatenation itself.
        noise: standard deviation, in normalised units, of Gaussian noise on the observations while training, so that
            few demonstrations are not learnt by heart.

    Raises:
        PolicyError: naming an image or the lack of any key, or `noise` is negative.
    """

    def __init__(self, observations: Mapping[str, ArraySpec], hidden: Sequence[int] = (), noise: float = 0.0) -> None:
        super().__init__(observations)
        if not noise >= 0:
            raise PolicyError(f"policy.encoder.noise must not be negative, got {noise:g}")
        self.noise = noise
        for key, array in observations.items():
            if array.dtype == "uint8":
                raise PolicyError(f"observation '{key}' is an image; use the encoder MultiModal instead of LowDim")
        width = sum(math.prod(array.shape) for array in observations.values())
        if not width:
            raise PolicyError("the encoder LowDim was given no observation; name at least one in the task")
        self.net = MLP((width, *hidden)) if hidden else nn.Identity()
        self.feature_dim = hidden[-1] if hidden else width

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Features [B, To, F] of {key: [B, To, ...]}."""
        x = torch.cat([obs[key].flatten(2) for key in self.observations], dim=2)
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        out: Tensor = self.net(x)
        return out
