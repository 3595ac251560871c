"""ResNet-18 as Diffusion Policy uses it: GroupNorm, and keypoints instead of an average at its end."""

from __future__ import annotations

from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.backbone import Backbone
from flowsteer.policies.errors import PolicyError

GROUP_WIDTH = 16
"""Channels per group of every GroupNorm; unlike batch statistics they suit small batches and averaged weights."""

REDUCTION = 32
"""Pixels per step of the last feature map."""


def norm(width: int) -> nn.GroupNorm:
    """GroupNorm over groups of 16 channels."""
    return nn.GroupNorm(width // GROUP_WIDTH, width)


@final
class SpatialSoftmax(nn.Module):
    """Where each channel is bright: the mean position under a softmax over pixels (Finn et al. 2016)."""

    def forward(self, maps: Tensor) -> Tensor:
        """[N, K, h, w] -> [N, 2 K]: x of all channels, then y; -1 is left or top, 1 right or bottom."""
        height, width = maps.shape[2:]
        # In float32 also under autocast, where a position would have 8 bits.
        weights = maps.flatten(2).float().softmax(dim=2).reshape(maps.shape)
        x = (weights.sum(dim=2) * torch.linspace(-1, 1, width, device=maps.device)).sum(dim=2)
        y = (weights.sum(dim=3) * torch.linspace(-1, 1, height, device=maps.device)).sum(dim=2)
        return torch.cat([x, y], dim=1)


@final
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection (He et al. 2016); the first strides."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False),
            norm(width_out),
            nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, padding=1, bias=False),
            norm(width_out),
        )
        same = stride == 1 and width_in == width_out
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(width_in, width_out, 1, stride, bias=False), norm(width_out))
        )

    def forward(self, h: Tensor) -> Tensor:
        """[N, width_in, h, w] -> [N, width_out, h / stride, w / stride]."""
        return torch.relu(self.body(h) + self.skip(h))


@final
class ResNet18(Backbone):
    """ResNet-18 with GroupNorm, spatial softmax and a linear map to the features.

    Args:
        channels: C.
        height: H.
        width: W.
        base_channels: channels of the first stage, a multiple of 16; 64 is the published width.
        keypoints: channels of the spatial softmax.
        features: feature_dim.

    Raises:
        PolicyError: the image is so small that the last feature map is a single row or column.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        base_channels: int = 64,
        keypoints: int = 32,
        features: int = 64,
    ) -> None:
        super().__init__(channels, height, width)
        if min(height, width) <= REDUCTION:
            raise PolicyError(
                f"ResNet18 needs images of more than {REDUCTION} pixels a side after the crop, got {height} x {width}; "
                "take SmallViT"
            )
        if base_channels < GROUP_WIDTH or base_channels % GROUP_WIDTH:
            raise PolicyError(f"base_channels of ResNet18 must be a multiple of {GROUP_WIDTH}, got {base_channels}")
        self.stem = nn.Sequential(
            nn.Conv2d(channels, base_channels, 7, stride=2, padding=3, bias=False),
            norm(base_channels),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        widths = [base_channels * 2**stage for stage in range(4)]
        self.stages = nn.Sequential(*_stage(base_channels, widths[0], 1))
        for width_in, width_out in pairwise(widths):
            self.stages.extend(_stage(width_in, width_out, 2))
        self.keypoints = nn.Sequential(nn.Conv2d(widths[-1], keypoints, 1), SpatialSoftmax())
        self.output = nn.Linear(2 * keypoints, features)
        self.feature_dim = features

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> [N, features]."""
        out: Tensor = self.output(self.keypoints(self.stages(self.stem(images))))
        return out


def _stage(width_in: int, width_out: int, stride: int) -> list[BasicBlock]:
    return [BasicBlock(width_in, width_out, stride), BasicBlock(width_out, width_out, 1)]
