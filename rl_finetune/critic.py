"""The value of an observation; a critic never sees the chunk, its noise or the denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from flowsteer.policies.networks.mlp import MLP
from flowsteer.policies.spec import configurable


@final
@configurable
class Critic(nn.Module):
    """A perceptron on the policy's encoded observations, which it does not train.

    Args:
        observed: To * F, width of an encoded observation.
        hidden: widths of the hidden layers.
    """

    def __init__(self, observed: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.net = MLP((observed, *hidden, 1))
        for parameter in self.net[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """V of encoded observations [B, To, F], [B]."""
        out: Tensor = self.net(features.detach().flatten(1)).squeeze(1)
        return out
