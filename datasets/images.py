"""Camera frames of every format become uint8 [N, H, W, C]."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from flowsteer.datasets.errors import DataError

CHANNELS = (1, 3, 4)
MIN_SIDE = 8


def may_be_image(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether frames of this stored shape and dtype can be camera frames.

    Floating frames count only with three channels: a floating [H, W, 1] is a depth map in metres.
    """
    if len(shape) != 3 or min(sorted(shape)[1:]) < MIN_SIDE:
        return False
    channels = shape[channel_axis(shape)]
    return channels in CHANNELS if dtype == np.uint8 else dtype.kind == "f" and channels == 3


def channel_axis(shape: tuple[int, ...]) -> int:
    """0 for [C, H, W], 2 for [H, W, C]."""
    return 0 if shape[0] in CHANNELS and shape[2] not in CHANNELS else 2


def channels_last(frames: NDArray[Any]) -> NDArray[Any]:
    """[N, C, H, W] or [N, H, W, C] to [N, H, W, C]."""
    return frames if channel_axis(frames.shape[1:]) == 2 else np.moveaxis(frames, 1, -1)


def within_byte_range(frames: NDArray[Any]) -> bool:
    """Whether floating frames hold 0..255 or 0..1 and not, say, point coordinates."""
    return bool(frames.size) and bool(np.isfinite(frames).all()) and frames.min() >= 0 and frames.max() <= 255


def as_uint8(frames: Iterator[NDArray[Any]], name: str) -> Iterator[NDArray[np.uint8]]:
    """Blocks of frames as uint8; floating frames hold 0..255, or 0..1 if the first block has only fractions in 0..1.

    Raises:
        DataError: naming `name` ("FILE: key 'img'") if a later block leaves the range of the first.
    """
    scale: float | None = None
    brightest, fractional = 0.0, False
    for block in frames:
        if block.dtype == np.uint8:
            yield block
            continue
        rounded = np.rint(block)
        fractional |= not np.array_equal(rounded, block)
        brightest = max(brightest, float(block.max()))
        if scale is None:
            scale = 255.0 if fractional and brightest <= 1 else 1.0
        if not within_byte_range(block) or brightest * scale > 255:
            raise DataError(f"{name}: image values leave 0..{255 / scale:g}: store the images as uint8 0..255")
        yield rounded.astype(np.uint8) if scale == 1 else np.rint(block * scale).astype(np.uint8)
    if scale == 1 and fractional and brightest <= 1:
        raise DataError(f"{name}: cannot tell images of 0..1 from 0..255: store the images as uint8 0..255")


def resize(frames: NDArray[np.uint8], size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Antialiased resize of [N, H, W, C] to `size` (height, width); None leaves them."""
    if size is None or frames.shape[1:3] == size:
        return frames
    tensor = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    small = functional.interpolate(tensor, size=size, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous().numpy()


def decode(encoded: bytes) -> NDArray[np.uint8]:
    """A PNG or JPEG file's bytes as [H, W, C]."""
    image = np.asarray(iio.imread(io.BytesIO(encoded)), dtype=np.uint8)
    return image[..., None] if image.ndim == 2 else image
