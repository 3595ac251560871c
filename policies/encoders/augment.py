"""Random crops and colours of image batches, computed on the batch and on its device.

Parameters are drawn per sample and shared by its To frames, so that motion between frames survives. They come from
torch's global generator, which a resumed training restores.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError


def crop(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Cut one window per sample, the same in all frames.

    Args:
        images: [B, To, H, W, C].
        top: [B] first row, in [0, H - height].
        left: [B] first column, in [0, W - width].
        height: rows of the window.
        width: columns of the window.

    Returns:
        [B, To, C, height, width].
    """
    # A view of every window there is; the index then copies one per sample, many times faster than single pixels.
    windows = images.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5, 6)
    return windows[torch.arange(len(images), device=images.device), top, left]


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scale brightness, then contrast, then saturation, and clamp.

    With grey(x) a pixel's luma and m the mean of b x over the sample: b x, then m + c (b x - m), then the same towards
    each pixel's grey; in one formula  b c s x + b c (1 - s) grey(x) + b (1 - c) mean(grey(x)).

    Args:
        images: [B, To, C, H, W] in [0, 1]; C = 3 is red, green, blue, otherwise all channels weigh the same.
        brightness: [B] factors b of the value.
        contrast: [B] factors c of the distance to the sample's mean grey (over all its frames).
        saturation: [B] factors s of the distance to the pixel's own grey.

    Returns:
        [B, To, C, H, W] in [0, 1].
    """
    b, c, s = (factor.view(-1, 1, 1, 1, 1) for factor in (brightness, contrast, saturation))
    grey = _grey(images)
    mean_grey = grey.mean(dim=(1, 2, 3, 4), keepdim=True)
    offset = torch.addcmul(b * (1 - c) * mean_grey, grey, b * c * (1 - s))
    return torch.addcmul(offset, images, b * c * s).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    """[B, To, C, H, W] -> [B, To, 1, H, W]; the luma of ITU-R BT.601 where there are three channels."""
    if images.shape[2] != 3:
        return images.mean(dim=2, keepdim=True)
    red, green, blue = images.unbind(2)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(2)


@final
class Augment(nn.Module):
    """uint8 images [B, To, H, W, C] -> [B, To, C, h, w] in [-1, 1]; random while training, else the centre and plain.

    Args:
        crop: side of the window as a share of the image's, in (0, 1]; 1 keeps the whole image.
        brightness: factors are uniform in 1 +- this, in [0, 1); 0 for none.
        contrast: likewise.
        saturation: likewise.

    Raises:
        PolicyError: a value is out of its range.
    """

    def __init__(
        self, crop: float = 1.0, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 < crop <= 1:
            raise PolicyError(f"crop must be in (0, 1], got {crop:g}")
        self.crop = crop
        self.spreads = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, spread in self.spreads.items():
            if not 0 <= spread < 1:
                raise PolicyError(f"{name} must be in [0, 1), got {spread:g}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns after the crop."""
        return max(1, round(self.crop * height)), max(1, round(self.crop * width))

    def forward(self, images: Tensor) -> Tensor:
        """[B, To, H, W, C] uint8 -> [B, To, C, h, w] in [-1, 1]."""
        window = self._window(images).contiguous().float().div_(255)
        if self.training and any(self.spreads.values()):
            window = jitter(window, **{name: _factors(window, spread) for name, spread in self.spreads.items()})
        return window.mul_(2).sub_(1)

    def _window(self, images: Tensor) -> Tensor:
        height, width = self.size(*images.shape[2:4])
        spare_rows, spare_columns = images.shape[2] - height, images.shape[3] - width
        if self.training and (spare_rows or spare_columns):
            return crop(images, _offsets(spare_rows, images), _offsets(spare_columns, images), height, width)
        top, left = spare_rows // 2, spare_columns // 2
        return images[:, :, top : top + height, left : left + width].permute(0, 1, 4, 2, 3)


def _offsets(largest: int, images: Tensor) -> Tensor:
    return torch.randint(largest + 1, (len(images),), device=images.device)


def _factors(images: Tensor, spread: float) -> Tensor:
    return 1 + spread * (2 * torch.rand(len(images), device=images.device) - 1)
