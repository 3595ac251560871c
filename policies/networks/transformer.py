"""A diffusion transformer: every action of the chunk is a token that looks at the observation and the time."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.networks.attention import CrossAttention, FeedForward, SelfAttention, check_heads
from flowsteer.policies.networks.base import Features, Network, check_shares, check_sizes
from flowsteer.policies.networks.time import TimeEmbedding

INIT_STD = 0.02
"""Of linear maps and positions, as in Diffusion Policy's transformer."""


@final
class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, perceptron; each behind a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.look_around = SelfAttention(width, heads, dropout, causal)
        self.look_at_memory = CrossAttention(width, heads, dropout)
        self.think = FeedForward(width, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Tokens [B, Tp, d], keys and values of the memory [B, 2, H, M, d / H] -> [B, Tp, d]."""
        around, across, within = self.norms
        key, value = memory.unbind(1)
        tokens = tokens + self.dropout(self.look_around(around(tokens)))
        tokens = tokens + self.dropout(self.look_at_memory(across(tokens), key, value))
        out: Tensor = tokens + self.dropout(self.think(within(tokens)))
        return out


@final
class DiffusionTransformer(Network):
    """Transformer decoder over the chunk; its memory is one token of time and one per observation step.

    Memory tokens do not look at each other, so their keys and values of all layers are computed once per grid (time)
    and once per chunk (observation).

    Args:
        action_dim: Da.
        prediction_steps: Tp.
        observation_steps: To.
        feature_dim: F.
        width: d, width of a token.
        layers: number of decoder layers.
        heads: attention heads.
        causal: an action looks only at earlier actions and itself.
        dropout: share dropped in attention, perceptrons and skip connections while training, in [0, 1).

    Raises:
        PolicyError: `width` is not a multiple of `heads`, or a size or share is out of its range.
    """

    def __init__(
        self,
        action_dim: int,
        prediction_steps: int,
        observation_steps: int,
        feature_dim: int,
        width: int = 256,
        layers: int = 8,
        heads: int = 4,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action_dim, prediction_steps, observation_steps, feature_dim)
        check_sizes(width=width, layers=layers, heads=heads)
        check_shares(dropout=dropout)
        check_heads(width, heads)
        self.memory_shape = (layers, 2, heads, width // heads)
        self.action = nn.Linear(action_dim, width)
        self.action_position = nn.Parameter(torch.randn(prediction_steps, width) * INIT_STD)
        self.time = TimeEmbedding(width, nn.Mish)
        self.observation = nn.Linear(feature_dim, width)
        self.observation_position = nn.Parameter(torch.randn(observation_steps, width) * INIT_STD)
        self.understand = FeedForward(width)
        self.memory_norm = nn.LayerNorm(width)
        self.memory = nn.Linear(width, 2 * layers * width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, dropout, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)
        self.apply(_initialise)
        nn.init.zeros_(self.output.weight)

    def embed_time(self, t: Tensor) -> Features:
        """Times [N] -> keys and values of the time token [N, layers, 2, H, 1, d / H]."""
        return (self._remember(self.time(t).unsqueeze(1)),)

    def embed_observation(self, features: Tensor) -> Features:
        """Encoded observations [B, To, F] -> keys and values [B, layers, 2, H, To, d / H]."""
        tokens = self.observation(features) + self.observation_position
        return (self._remember(tokens + self.understand(tokens)),)

    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        """Noisy chunks [B, Tp, Da] -> prediction [B, Tp, Da]."""
        tokens = self.action(x) + self.action_position
        time_memory = time[0].expand(len(x), *time[0].shape[1:])
        memories = torch.cat([time_memory, observation[0]], dim=4).unbind(1)
        for layer, memory in zip(self.layers, memories, strict=True):
            tokens = layer(tokens, memory)
        out: Tensor = self.output(self.norm(tokens))
        return out

    def _remember(self, tokens: Tensor) -> Tensor:
        memory: Tensor = self.memory(self.memory_norm(tokens))
        return memory.reshape(*tokens.shape[:2], *self.memory_shape).movedim(1, 4)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
