"""The contract of encoders: observations in, one feature vector per observation step out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from flowsteer.policies.spec import ArraySpec, configurable


@configurable
class Encoder(nn.Module, ABC):
    """Observations {key: [B, To, ...]} -> features [B, To, F].

    Concrete encoders are final, take the observation specs first, then typed hyper-parameters with defaults, refuse
    keys that they cannot read and set `feature_dim`.

    Args:
        observations: key -> shape and dtype of one step.
    """

    feature_dim: int
    """F."""

    normalizers: dict[str, str]
    """The normaliser of each key that wants another than the policy's default."""

    def __init__(self, observations: Mapping[str, ArraySpec]) -> None:
        super().__init__()
        self.observations = dict(observations)
        self.normalizers = {}

    @abstractmethod
    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Features [B, To, F] of normalised arrays (about [-1, 1]) and of uint8 images [B, To, H, W, C]."""


EncoderFactory = Callable[[Mapping[str, ArraySpec]], Encoder]
"""Observation specs -> encoder."""
