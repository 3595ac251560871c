from __future__ import annotations

import numpy as np
import pytest

from flowsteer.datasets import DataError
from flowsteer.datasets.images import as_uint8, channels_last, may_be_image, resize


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((96, 96, 3), "uint8", True),
        ((3, 96, 96), "uint8", True),
        ((84, 84, 1), "uint8", True),
        ((96, 96, 3), "float32", True),
        ((3, 96, 96), "float32", True),
        ((84, 84, 1), "float32", False),  # depth in metres
        ((9, 2), "float32", False),
        ((2, 1024, 3), "float32", False),  # point clouds of two cameras
        ((96, 96, 5), "uint8", False),
        ((96, 96, 3), "int64", False),
    ],
)
def test_what_may_be_an_image(shape, dtype, expected):
    assert may_be_image(shape, np.dtype(dtype)) is expected


def convert(*blocks):
    return np.concatenate(list(as_uint8(iter([np.asarray(block) for block in blocks]), "d.zarr: key 'img'")))


def test_values_of_0_to_255_and_of_0_to_1():
    assert convert([0.0, 17.0], [255.0, 1.0]).tolist() == [0, 17, 255, 1]
    assert convert([0.0, 0.5], [1.0, 0.2]).tolist() == [0, 128, 255, 51]
    assert convert(np.array([3, 4], np.uint8)).tolist() == [3, 4]
    assert convert([0.0, 1.0], [0.0, 200.0]).tolist() == [0, 1, 0, 200]  # a dark first block of 0..255


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (([0.0, 9.0], [256.0]), r"leave 0..255: store the images as uint8"),
        (([0.0, 0.5], [1.5]), r"leave 0..1"),
        (([9.0], [-1.0]), "leave 0..255"),
        (([9.0], [np.nan]), "leave 0..255"),
        (([0.0, 1.0], [0.5]), "cannot tell images of 0..1 from 0..255"),
    ],
)
def test_ranges_that_change_are_refused(blocks, message):
    with pytest.raises(DataError, match=f"d.zarr: key 'img': .*{message}"):
        convert(*blocks)


def test_channels_go_last():
    assert channels_last(np.zeros((5, 3, 20, 30))).shape == (5, 20, 30, 3)
    assert channels_last(np.zeros((5, 20, 30, 3))).shape == (5, 20, 30, 3)


def test_resize_averages():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    frames[1, :, ::2] = 200
    small = resize(frames, (4, 4))
    assert small.shape == (2, 4, 4, 3)
    assert small[0].max() == 0
    assert 95 <= small[1, 1, 1, 0] <= 105
    assert resize(frames, None) is frames
