"""An energy transformer: a few actions make a token that looks at the others and the observation, at no time.

Blocks are parallel (ViT-22B, Dehghani et al. 2023): attention and perceptron share a norm, and a product on each side.
Training differentiates twice through every operation, so the fewer and larger, the better.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowsteer.policies.networks.attention import check_heads, merge_heads, split_heads
from flowsteer.policies.networks.base import Features, Network, check_sizes

INIT_STD = 0.02
"""Of positions, as in `DiffusionTransformer`."""
EPS = 1e-6
"""Added to mean squares."""


def rms_norm(tokens: Tensor) -> Tensor:
    """Divide by the root mean square over the channels [..., d], never over the batch: a row knows nothing of others.

    Without a gain, which the product that follows can have in its weights.
    """
    # Not the one of torch, whose second derivative takes twice as many passes over the tokens.
    return tokens * (tokens * tokens).mean(-1, keepdim=True).add(EPS).rsqrt()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries [B, H, N, d / H], keys and values [B, H, M, d / H] -> [B, N, d]."""
    # Written out: the fused kernels of torch have no second derivative.
    return merge_heads((query @ key.transpose(2, 3)).softmax(3) @ value)


@final
class EnergyBlock(nn.Module):
    """Self-attention, cross-attention and perceptron side by side, beside a skip connection.

    Queries and keys are normalised per head (Henry et al. 2020): a descent leads tokens far from where training has
    been, and logits must not grow with them.
    """

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads, hidden = heads, expansion * width
        self.widths = (width, width, width, width, hidden)
        self.project = nn.Linear(width, sum(self.widths))
        self.output = nn.Linear(2 * width + hidden, width)
        self.memory = nn.Linear(width, 2 * width)
        # Of normalised queries and keys the usual scale makes logits of deviation 1.
        self.sharpness = nn.Parameter(torch.full((2, heads, 1, 1), (width / heads) ** -0.5))

    def remember(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Observation tokens [B, M, d] -> keys and values [B, H, M, d / H]."""
        key, value = (split_heads(part, self.heads) for part in self.memory(tokens).chunk(2, dim=2))
        return rms_norm(key), value

    def forward(self, tokens: Tensor, memory_key: Tensor, memory_value: Tensor) -> Tensor:
        """Tokens [B, N, d], keys and values of the observation [B, H, M, d / H] -> [B, N, d]."""
        *parts, hidden = self.project(rms_norm(tokens)).split(self.widths, dim=2)
        query, key, value, question = (split_heads(part, self.heads) for part in parts)
        inward, outward = self.sharpness
        around = attend(inward * rms_norm(query), rms_norm(key), value)
        across = attend(outward * rms_norm(question), memory_key, memory_value)
        # Smooth everywhere, as what is differentiated twice must be.
        out: Tensor = tokens + self.output(torch.cat([around, across, F.silu(hidden)], dim=2))
        return out


@final
class EnergyTransformer(Network):
    """Transformer over the chunk for `EnergyPolicy`: how noisy a chunk is, it must see from the chunk.

    Args:
        action_dim: Da.
        prediction_steps: Tp.
        observation_steps: To.
        feature_dim: F.
        width: d, width of a token.
        layers: number of blocks.
        heads: attention heads.
        expansion: width of a block's perceptron, in units of `width`.
        token_steps: successive actions of a token; the time of training goes with the number of tokens.
        memory_tokens: tokens of an observation step.

    Raises:
        PolicyError: `width` is not a multiple of `heads`, or a size is out of its range.
    """

    sees_time = False

    def __init__(
        self,
        action_dim: int,
        prediction_steps: int,
        observation_steps: int,
        feature_dim: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        expansion: int = 2,
        token_steps: int = 4,
        memory_tokens: int = 4,
    ) -> None:
        super().__init__(action_dim, prediction_steps, observation_steps, feature_dim)
        check_sizes(width=width, layers=layers, heads=heads, expansion=expansion)
        check_sizes(token_steps=token_steps, memory_tokens=memory_tokens)
        check_heads(width, heads)
        tokens = -(-prediction_steps // token_steps)
        # The last token is filled up with zeros.
        self.missing = tokens * token_steps - prediction_steps
        self.action = nn.Linear(token_steps * action_dim, width)
        self.action_position = nn.Parameter(torch.randn(tokens, width) * INIT_STD)
        self.observation = nn.Sequential(
            nn.Linear(feature_dim, 2 * width), nn.SiLU(), nn.Linear(2 * width, memory_tokens * width)
        )
        self.observation_position = nn.Parameter(torch.randn(observation_steps * memory_tokens, width) * INIT_STD)
        self.blocks = nn.ModuleList(EnergyBlock(width, heads, expansion) for _ in range(layers))
        self.output = nn.Linear(width, token_steps * action_dim)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def embed_time(self, t: Tensor) -> Features:
        """Nothing, whatever the times [N]."""
        return ()

    def embed_observation(self, features: Tensor) -> Features:
        """Encoded observations [B, To, F] -> keys and values of each block, [B, H, M, d / H]."""
        tokens = self.observation(features).reshape(len(features), *self.observation_position.shape)
        tokens = rms_norm(tokens + self.observation_position)
        blocks = cast("Iterable[EnergyBlock]", self.blocks)
        return tuple(part for block in blocks for part in block.remember(tokens))

    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        """Chunks [B, Tp, Da] -> [B, Tp, Da]."""
        filled = F.pad(x, (0, 0, 0, self.missing))
        tokens = self.action(filled.reshape(len(x), len(self.action_position), -1)) + self.action_position
        for block, key, value in zip(self.blocks, observation[::2], observation[1::2], strict=True):
            tokens = block(tokens, key, value)
        out: Tensor = self.output(rms_norm(tokens))
        return out.reshape(filled.shape)[:, : x.shape[1]]
