"""The contract of image backbones: images in, one vector each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from flowsteer.policies.spec import configurable


@configurable
class Backbone(nn.Module, ABC):
    """Images [N, C, H, W] in [-1, 1] -> vectors [N, feature_dim].

    Concrete backbones are final, take the image's sizes first, then typed hyper-parameters with defaults, and set
    `feature_dim`.

    Args:
        channels: C.
        height: H.
        width: W.
    """

    feature_dim: int

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.channels, self.height, self.width = channels, height, width

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Vectors [N, feature_dim] of images [N, C, H, W] in [-1, 1]."""


BackboneFactory = Callable[[int, int, int], Backbone]
"""C, H, W -> backbone."""
