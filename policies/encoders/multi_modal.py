"""Images, point clouds and vectors side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.base import Encoder, EncoderFactory
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.point_cloud import PointCloud
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.spec import ArraySpec


@final
class MultiModal(Encoder):
    """Every observation through the encoder of its kind; features concatenated: images, point clouds, vectors.

    Args:
        observations: uint8 arrays are images, those named in `point_keys` are point clouds, all others vectors.
        images: builds the encoder of all images.
        points: builds the encoder of all point clouds.
        state: builds the encoder of all vectors.
        point_keys: names of the point clouds.

    Raises:
        PolicyError: `point_keys` names an observation that is not there; further, whatever the encoders refuse.
    """

    def __init__(
        self,
        observations: Mapping[str, ArraySpec],
        images: EncoderFactory = Cameras,
        points: EncoderFactory = PointCloud,
        state: EncoderFactory = LowDim,
        point_keys: Sequence[str] = (),
    ) -> None:
        super().__init__(observations)
        unknown = sorted(set(point_keys) - set(observations))
        if unknown:
            raise PolicyError(f"point_keys names '{unknown[0]}', the observations are {sorted(observations)}")
        factories = {"images": images, "points": points, "state": state}
        groups: dict[str, dict[str, ArraySpec]] = {kind: {} for kind in factories}
        for key, array in observations.items():
            groups[_kind(key, array, point_keys)][key] = array
        encoders = {kind: factories[kind](group) for kind, group in groups.items() if group}
        self.encoders = nn.ModuleDict(encoders)
        for encoder in encoders.values():
            self.normalizers |= encoder.normalizers
        self.feature_dim = sum(encoder.feature_dim for encoder in encoders.values())

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Features [B, To, F] of {key: [B, To, ...]}."""
        return torch.cat([encoder(obs) for encoder in self.encoders.values()], dim=2)


def _kind(key: str, array: ArraySpec, point_keys: Sequence[str]) -> str:
    if key in point_keys:
        return "points"
    return "images" if array.dtype == "uint8" else "state"
