"""Frames of video files at given times, decoded once and in order through PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import final

import av
import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError

BLOCK_FRAMES = 32


@final
@dataclass(frozen=True)
class Segment:
    """The frames of one episode: `file`, and when each is shown in it, `times_s` [L], increasing."""

    file: Path
    times_s: NDArray[np.float64]


def frame_shape(file: Path) -> tuple[int, int, int]:
    """(height, width, 3) of a video.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            return stream.height, stream.width, 3
    except (OSError, IndexError, av.FFmpegError) as error:
        raise _unreadable(file, error) from error


def read_frames(segments: Sequence[Segment], fps: float) -> Iterator[NDArray[np.uint8]]:
    """The frames of all segments in order, uint8 [n, H, W, 3] in blocks; every file is decoded once.

    Raises:
        DataError: naming the file, if it cannot be read or has no frame within half a period of a wanted time.
    """
    for file, group in groupby(segments, key=lambda segment: segment.file):
        wanted_s = np.concatenate([segment.times_s for segment in group])
        block: list[NDArray[np.uint8]] = []
        for frame in _matching(file, wanted_s, 0.5 / fps):
            block.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
            if len(block) == BLOCK_FRAMES:
                yield np.stack(block)
                block = []
        if block:
            yield np.stack(block)


def _matching(file: Path, wanted_s: NDArray[np.float64], tolerance_s: float) -> Iterator[av.VideoFrame]:
    found = 0
    for frame in _decoded(file):
        time_s = float(frame.time or 0.0)
        if time_s < wanted_s[found] - tolerance_s:
            continue
        if time_s > wanted_s[found] + tolerance_s:
            break
        yield frame
        found += 1
        if found == len(wanted_s):
            return
    raise DataError(
        f"{file}: no frame at {wanted_s[found]:.3f} s (frame {found} of {len(wanted_s)} wanted): the video is shorter "
        f"than its episodes or out of step; download it again or leave its key out"
    )


def _decoded(file: Path) -> Iterator[av.VideoFrame]:
    try:
        with av.open(str(file)) as container:
            container.streams.video[0].thread_type = "AUTO"
            yield from container.decode(video=0)
    except (OSError, IndexError, av.FFmpegError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: the video cannot be read ({error}): download it again or leave its key out")
