"""The contract of networks: x_t, time and observation in, raw prediction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.spec import configurable

Features = tuple[Tensor, ...]
"""What a network has computed of times or observations alone; every tensor has a leading batch (or grid) dimension."""


def check_sizes(**sizes: int) -> None:
    """Raise PolicyError, naming the hyper-parameter, unless all are at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise PolicyError(f"policy.network.{name} must be at least 1, got {size}")


def check_shares(**shares: float) -> None:
    """Raise PolicyError, naming the hyper-parameter, unless all are in [0, 1)."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise PolicyError(f"policy.network.{name} must be in [0, 1), got {share:g}")


@configurable
class Network(nn.Module, ABC):
    """x_t, t, observation -> raw prediction of the chunk's shape.

    A chunk is denoised K times under one observation, and all chunks share the K times of the grid. So whatever
    depends on the observation alone is computed in `embed_observation`, once per chunk; whatever depends on the time
    alone in `embed_time`, once per grid; `forward` holds the rest.

    Concrete networks are final and take the four sizes first, then typed hyper-parameters with defaults.

    Args:
        action_dim: Da.
        prediction_steps: Tp.
        observation_steps: To.
        feature_dim: F, width of an encoded observation step.
    """

    sees_time: ClassVar[bool] = True
    """Whether its prediction depends on t; a network that descends an energy needs none."""

    def __init__(self, action_dim: int, prediction_steps: int, observation_steps: int, feature_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.prediction_steps = prediction_steps
        self.observation_steps = observation_steps
        self.feature_dim = feature_dim

    @abstractmethod
    def embed_time(self, t: Tensor) -> Features:
        """Times t [N] in [0, 1] -> tensors [N, ...]."""

    def settle(self, time: Features) -> Features:
        """Features of one time [1, ...], of which `forward` needs no number to know its way: a compiler cannot look."""
        return time

    @abstractmethod
    def embed_observation(self, features: Tensor) -> Features:
        """Encoded observations [B, To, F] -> tensors [B, ...]."""

    @abstractmethod
    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        """Noisy chunks x [B, Tp, Da] -> prediction [B, Tp, Da]; `time` is of B times or of one that all rows share."""


NetworkFactory = Callable[[int, int, int, int], Network]
"""Da, Tp, To, F -> network."""
