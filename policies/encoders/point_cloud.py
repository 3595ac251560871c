"""Point clouds: sets of points whose order says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.base import Encoder
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.spec import ArraySpec


@final
class PointNet(nn.Module):
    """The same perceptron on every point, then the maximum over points (Qi et al. 2017; Ze et al. 2024)."""

    def __init__(self, channels: int, hidden: Sequence[int], features: int) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.ReLU())
            for width_in, width_out in pairwise((channels, *hidden))
        ]
        self.per_point = nn.Sequential(*layers)
        self.output = nn.Sequential(nn.Linear(hidden[-1], features), nn.LayerNorm(features))

    def forward(self, points: Tensor) -> Tensor:
        """[..., P, C] -> [..., features]."""
        out: Tensor = self.output(self.per_point(points).amax(dim=-2))
        return out


@final
class PointCloud(Encoder):
    """Every point cloud through a PointNet of its own; features in the order of the specs.

    Its keys are not normalised unless told otherwise, since the geometry is lost where points are not treated alike:
    coordinates are in metres around the workspace.

    Args:
        observations: arrays (P, C): P points with C >= 3 channels, coordinates first, then colours or the like.
        hidden: widths of the perceptron on each point.
        features: width of one cloud's features.

    Raises:
        PolicyError: naming a key that is no point cloud.
    """

    def __init__(
        self, observations: Mapping[str, ArraySpec], hidden: Sequence[int] = (64, 128, 256), features: int = 64
    ) -> None:
        super().__init__(observations)
        if not observations or not hidden:
            raise PolicyError("the encoder PointCloud needs at least one observation and one hidden width")
        for key, array in observations.items():
            if array.dtype == "uint8" or len(array.shape) != 2 or array.shape[1] < 3:
                raise PolicyError(
                    f"observation '{key}' must be a float point cloud (P, C) with C >= 3, "
                    f"got {array.dtype} {array.shape}"
                )
        self.normalizers = dict.fromkeys(observations, "identity")
        self.nets = nn.ModuleList(PointNet(array.shape[1], hidden, features) for array in observations.values())
        self.feature_dim = features * len(self.nets)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Features [B, To, F] of {key: [B, To, P, C]}."""
        return torch.cat([net(obs[key]) for net, key in zip(self.nets, self.observations, strict=True)], dim=2)
