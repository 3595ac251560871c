"""A residual perceptron over the flattened chunk: the fastest network on a CPU, good for low-dimensional tasks."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.networks.base import Features, Network, check_shares, check_sizes
from flowsteer.policies.networks.time import TimeEmbedding


@final
class ModulatedBlock(nn.Module):
    """h + gate * mlp(norm(h) * (1 + scale) + shift), the adaptive norm of DiT (Peebles & Xie 2023)."""

    def __init__(self, hidden: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, expansion * hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(expansion * hidden, hidden)
        )

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Activations [B, hidden], modulation [B, 3 * hidden] -> [B, hidden]."""
        shift, scale, gate = modulation.chunk(3, dim=1)
        return torch.addcmul(h, gate, self.mlp(torch.addcmul(shift, self.norm(h), 1 + scale)))


@final
class ResidualMLP(Network):
    """Residual perceptron whose blocks are modulated by time and observation; the observation is an input as well.

    The modulations are linear in the embeddings of time and observation, so they split into a sum of two parts that
    `embed_time` and `embed_observation` compute.

    Args:
        action_dim: Da.
        prediction_steps: Tp.
        observation_steps: To.
        feature_dim: F.
        hidden: width of the residual stream.
        blocks: number of residual blocks.
        expansion: width of a block's inner layer, in units of `hidden`.
        conditioning: width of the embeddings of time and observation.
        dropout: share of a block's inner units dropped while training, in [0, 1).

    Raises:
        PolicyError: a size or share is out of its range.
    """

    def __init__(
        self,
        action_dim: int,
        prediction_steps: int,
        observation_steps: int,
        feature_dim: int,
        hidden: int = 256,
        blocks: int = 4,
        expansion: int = 2,
        conditioning: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action_dim, prediction_steps, observation_steps, feature_dim)
        check_sizes(hidden=hidden, blocks=blocks, expansion=expansion, conditioning=conditioning)
        check_shares(dropout=dropout)
        chunk, observed, modulations = (
            prediction_steps * action_dim,
            observation_steps * feature_dim,
            3 * hidden * blocks,
        )
        self.time = TimeEmbedding(conditioning)
        self.time_modulation = nn.Linear(conditioning, modulations)
        self.observation = nn.Sequential(nn.Linear(observed, conditioning), nn.SiLU())
        self.observation_modulation = nn.Linear(conditioning, modulations, bias=False)
        self.observation_input = nn.Linear(observed, hidden, bias=False)
        self.chunk_input = nn.Linear(chunk, hidden)
        self.blocks = nn.ModuleList(ModulatedBlock(hidden, expansion, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, chunk)
        for layer in (self.time_modulation, self.observation_modulation, self.output):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def embed_time(self, t: Tensor) -> Features:
        """Times [N] -> modulations [N, blocks * 3 * hidden]."""
        return (self.time_modulation(self.time(t)),)

    def embed_observation(self, features: Tensor) -> Features:
        """Encoded observations [B, To, F] -> input [B, hidden], modulations [B, blocks * 3 * hidden]."""
        flat = features.flatten(1)
        return self.observation_input(flat), self.observation_modulation(self.observation(flat))

    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        """Noisy chunks [B, Tp, Da] -> prediction [B, Tp, Da]."""
        (time_modulation,), (observation_input, observation_modulation) = time, observation
        h = self.chunk_input(x.flatten(1)) + observation_input
        modulations = (time_modulation + observation_modulation).chunk(len(self.blocks), dim=1)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            h = block(h, modulation)
        out: Tensor = self.output(self.norm(h))
        return out.reshape(x.shape)
