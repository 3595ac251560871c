"""A small vision transformer, the backbone that DPPO (Ren et al. 2024) and IBRL (Hu et al. 2023) train from scratch."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.backbone import Backbone
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.attention import FeedForward, SelfAttention

STEM = ((8, 4), (3, 2))
"""Kernel and stride of the two convolutions that make overlapping patches, one every 8 pixels."""

INIT_STD = 0.02
"""Of the positions and linear maps."""


def patches(pixels: int) -> int:
    """Patches along a side of so many pixels."""
    for kernel, stride in STEM:
        pixels = (pixels - kernel) // stride + 1
    return pixels


@final
class EncoderLayer(nn.Module):
    """Self-attention and perceptron; each behind a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.look_around = nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads))
        self.think = nn.Sequential(nn.LayerNorm(width), FeedForward(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, P, d] -> [N, P, d]."""
        tokens = tokens + self.look_around(tokens)
        out: Tensor = tokens + self.think(tokens)
        return out


@final
class SpatialEmbedding(nn.Module):
    """P tokens of width d -> one vector: features learn which patches and which of their channels to read."""

    def __init__(self, tokens: int, width: int, features: int) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.Linear(tokens, features), nn.LayerNorm(features), nn.ReLU())
        self.channels = nn.Parameter(torch.randn(width, features) * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, P, d] -> [N, features]."""
        out: Tensor = (self.places(tokens.transpose(1, 2)) * self.channels).sum(dim=1)
        return out


@final
class SmallViT(Backbone):
    """Overlapping patches from two convolutions, a few transformer layers, a learned spatial embedding.

    Args:
        channels: C.
        height: H.
        width: W.
        embed_dim: width of a token.
        layers: transformer layers.
        heads: attention heads.
        features: feature_dim.

    Raises:
        PolicyError: the image is smaller than one patch, or `embed_dim` is not a multiple of `heads`.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        embed_dim: int = 128,
        layers: int = 1,
        heads: int = 4,
        features: int = 128,
    ) -> None:
        super().__init__(channels, height, width)
        rows, columns = patches(height), patches(width)
        if min(rows, columns) < 1:
            raise PolicyError(f"SmallViT needs images of at least 16 pixels a side, got {height} x {width}")
        (kernel, stride), (next_kernel, next_stride) = STEM
        self.stem = nn.Sequential(
            nn.Conv2d(channels, embed_dim, kernel, stride),
            nn.ReLU(),
            nn.Conv2d(embed_dim, embed_dim, next_kernel, next_stride),
        )
        self.position = nn.Parameter(torch.randn(rows * columns, embed_dim) * INIT_STD)
        self.layers = nn.Sequential(*(EncoderLayer(embed_dim, heads) for _ in range(layers)), nn.LayerNorm(embed_dim))
        self.output = SpatialEmbedding(rows * columns, embed_dim, features)
        self.feature_dim = features
        self.layers.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> [N, features]."""
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.output(self.layers(tokens))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(module.bias)
