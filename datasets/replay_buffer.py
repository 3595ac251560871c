"""The one in-memory form of demonstrations: flat arrays and where each episode ends.

Dimension letters used in this room:
N frames (control steps) of all episodes together, E episodes, L frames of one episode, W windows,
B batch, To observation steps, Tp predicted steps, Ta executed steps, Do / Da observation / action width.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import numpy as np
import zarr
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError

Array: TypeAlias = NDArray[Any] | zarr.Array[Any]
"""Rows on the first axis: in memory, memory-mapped, or a zarr array that is read where it lies."""

ACTION = "action"
BLOCK_BYTES = 16 << 20


@final
@dataclass(frozen=True)
class ReplayBuffer:
    """E episodes of demonstrations, one after another.

    data: each [N, ...]; `action` [N, Da] in the robot's or simulator's physical units, images uint8 [N, H, W, C],
        everything else in the dtype of its source.
    episode_ends: int64 [E], strictly increasing; episode e holds the frames from `episode_ends[e - 1]` (0 for the
        first) up to but not including `episode_ends[e]`.
    meta: plain JSON types. Known entries, each there only if the source tells: `source` (path), `format`,
        `control_hz`, `env_args` (robomimic's), `robot`, `names` ({key: channel names}) and
        `episodes` ({name: E values}, such as `task` or `model_file`).
    check_finite: refuse NaN and infinite values in floating arrays.

    Raises:
        DataError: naming the source, the key and the remedy, if lengths, episode ends or values are wrong.
    """

    data: dict[str, Array]
    episode_ends: NDArray[np.int64]
    meta: dict[str, Any] = field(default_factory=dict)
    check_finite: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "episode_ends", np.asarray(self.episode_ends, dtype=np.int64))
        check_episode_ends(self.episode_ends, {key: array.shape[0] for key, array in self.data.items()}, self.source)
        if self.check_finite:
            for key, array in self.data.items():
                if array.dtype.kind == "f":
                    self._check_finite(key)

    def _check_finite(self, key: str) -> None:
        for start, block in blocks(self.array(key)):
            bad = non_finite_rows(block)
            if bad.size:
                raise non_finite_error(self.source, key, start + int(bad[0]), self.episode_ends)

    @property
    def source(self) -> str:
        """Where the data came from, for messages."""
        return str(self.meta.get("source", "buffer"))

    @property
    def num_frames(self) -> int:
        """N."""
        return int(self.episode_ends[-1])

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.episode_ends)

    @property
    def episode_starts(self) -> NDArray[np.int64]:
        """int64 [E], the first frame of each episode."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        """int64 [E], frames per episode."""
        return np.diff(self.episode_ends, prepend=0)

    @property
    def control_hz(self) -> float | None:
        """Frames per second, if the source tells."""
        rate = self.meta.get("control_hz")
        return None if rate is None else float(rate)

    def array(self, key: str) -> Array:
        """The array of `key`.

        Raises:
            DataError: naming the nearest key if there is none of that name.
        """
        if key not in self.data:
            raise missing_key_error(self.source, key, self.data)
        return self.data[key]


def is_image(array: Array) -> bool:
    """Whether `array` holds camera frames, uint8 [N, H, W, C]."""
    return array.ndim == 4 and array.dtype == np.uint8


def rows(array: Array, indices: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """`array[indices]`, any order and with repeats; a zarr array is asked for each row once, in order."""
    if isinstance(array, np.ndarray):
        return np.take(array, indices, axis=0)
    wanted, places = np.unique(indices, return_inverse=True)
    stored: NDArray[Any] = np.asarray(array.oindex[wanted])
    return stored[places]


def blocks(array: Array, start: int = 0, end: int | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
    """Frames `start` to `end` of `array` in pieces of about 16 MB, each with its first frame's number."""
    end = array.shape[0] if end is None else end
    frame_bytes = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
    step = max(1, BLOCK_BYTES // frame_bytes)
    for first in range(start, end, step):
        yield first, np.asarray(array[first : min(first + step, end)])


def non_finite_rows(block: NDArray[Any]) -> NDArray[np.int64]:
    """The rows of `block` that hold a NaN or an infinite value."""
    if block.dtype.kind != "f":
        return np.empty(0, np.int64)
    flat = block.reshape(len(block), -1)
    return np.flatnonzero(~np.isfinite(flat).all(axis=1))


def non_finite_error(source: str, key: str, frame: int, episode_ends: NDArray[np.int64]) -> DataError:
    """The error for a NaN or an infinite value at `frame`."""
    episode = int(np.searchsorted(episode_ends, frame, side="right"))
    return DataError(
        f"{source}: key '{key}' holds a NaN or infinite value at frame {frame} (episode {episode}): "
        f"remove that episode or repair the recording; `flowsteer data inspect` shows all such channels"
    )


def missing_key_error(source: str, key: str, available: Iterable[str]) -> DataError:
    """The error for a key that a data set does not have, with the nearest that it has."""
    names = sorted(available)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean '{near[0]}'? It" if near else "it"
    return DataError(f"{source}: there is no key '{key}': {hint} has {', '.join(names)}")


def check_episode_ends(ends: NDArray[np.int64], lengths: dict[str, int], source: str) -> None:
    """Refuse episode ends that do not partition arrays of these lengths.

    Raises:
        DataError: naming the source, the key or episode, and the remedy.
    """
    if not lengths:
        raise DataError(f"{source}: there are no arrays to read: check that this is the data set's own folder or file")
    if ends.ndim != 1 or ends.size == 0:
        raise DataError(f"{source}: key 'episode_ends' is empty: record at least one episode")
    episode_lengths = np.diff(ends, prepend=0)
    if (episode_lengths <= 0).any():
        episode = int(np.argmax(episode_lengths <= 0))
        raise DataError(
            f"{source}: key 'episode_ends': episode {episode} has {episode_lengths[episode]} frames: "
            f"remove episodes of no length, ends must strictly increase"
        )
    for key, length in lengths.items():
        if length != ends[-1]:
            raise DataError(
                f"{source}: key '{key}' has {length} frames but 'episode_ends' ends at {ends[-1]}: "
                f"the file is incomplete or was edited; copy or convert it again"
            )
