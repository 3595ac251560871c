"""One or several cameras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.encoders.augment import Augment
from flowsteer.policies.encoders.backbone import Backbone, BackboneFactory
from flowsteer.policies.encoders.base import Encoder
from flowsteer.policies.encoders.resnet import ResNet18
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.spec import ArraySpec


@final
class Cameras(Encoder):
    """Every camera through a backbone of its own or through one that all share; features in the order of the specs.

    Args:
        observations: uint8 images (H, W, C).
        backbone: builds a backbone from C and the cropped H and W, e.g. `ResNet18` or `SmallViT`.
        shared: one backbone for all cameras, which must have the same shape.
        crop: side of the random (in evaluation: centre) crop as a share of the image's, in (0, 1].
        brightness: colour jitter while training, see `Augment`.
        contrast: likewise.
        saturation: likewise.

    Raises:
        PolicyError: naming a key that is no image, too small, or of another shape than the first where shared.
    """

    def __init__(
        self,
        observations: Mapping[str, ArraySpec],
        backbone: BackboneFactory = ResNet18,
        shared: bool = False,
        crop: float = 0.9,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
    ) -> None:
        super().__init__(observations)
        _check(observations, shared)
        self.augment = Augment(crop, brightness, contrast, saturation)
        owners = list(observations.items())[:1] if shared else observations.items()
        backbones = [self._build(backbone, key, array) for key, array in owners]
        self.backbones = nn.ModuleList(backbones)
        self.feature_dim = sum(net.feature_dim for net in backbones) * (len(observations) // len(backbones))

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Features [B, To, F] of {key: uint8 [B, To, H, W, C]}."""
        images = [self.augment(obs[key]) for key in self.observations]
        batch, steps = images[0].shape[:2]
        frames = [image.flatten(0, 1) for image in images]
        if len(self.backbones) == 1:
            # One call on all frames of all cameras: a shared backbone is fastest on one large batch.
            vectors = list(self.backbones[0](torch.cat(frames)).chunk(len(frames)))
        else:
            vectors = [backbone(frame) for backbone, frame in zip(self.backbones, frames, strict=True)]
        return torch.cat(vectors, dim=1).reshape(batch, steps, self.feature_dim)

    def _build(self, backbone: BackboneFactory, key: str, array: ArraySpec) -> Backbone:
        height, width, channels = array.shape
        try:
            return backbone(channels, *self.augment.size(height, width))
        except PolicyError as error:
            raise PolicyError(f"observation '{key}': {error}") from None


def _check(observations: Mapping[str, ArraySpec], shared: bool) -> None:
    if not observations:
        raise PolicyError("the encoder Cameras was given no image; name at least one in the task")
    first = next(iter(observations))
    for key, array in observations.items():
        if array.dtype != "uint8" or len(array.shape) != 3:
            raise PolicyError(f"observation '{key}' must be a uint8 image (H, W, C), got {array.dtype} {array.shape}")
        if shared and array.shape != observations[first].shape:
            raise PolicyError(
                f"observation '{key}' is {array.shape} and '{first}' {observations[first].shape}: "
                "a shared backbone needs images of one shape; set shared=false"
            )
