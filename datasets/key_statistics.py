"""Exact statistics of the training episodes, for a policy's normaliser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.replay_buffer import (
    Array,
    ReplayBuffer,
    blocks,
    is_image,
    non_finite_error,
    non_finite_rows,
)
from flowsteer.datasets.splits import episode_mask

Vector = NDArray[np.float64]


@final
@dataclass(frozen=True)
class KeyStatistics:
    """Over `count` frames; each array float64 in the shape of one frame ([C] for images: per channel, in 0..255; [1]
    for one number per frame).

    `std` is the population's (divided by the count).
    """

    min: Vector
    max: Vector
    mean: Vector
    std: Vector
    count: int


def statistics(
    buffer: ReplayBuffer, keys: Sequence[str], episodes: NDArray[Any] | Sequence[int] | None = None
) -> dict[str, KeyStatistics]:
    """Minimum, maximum, mean and standard deviation of `keys` over the frames of `episodes` (mask, numbers, or all).

    Computed in float64 in blocks, so that an array on disk is never loaded whole.

    Raises:
        DataError: for a missing key, or naming the first frame with a NaN or infinite value.
    """
    mask = episode_mask(episodes, buffer.num_episodes)
    return {key: _of_key(buffer, key, mask) for key in keys}


def statistics_of(blocks: Iterable[NDArray[Any]]) -> KeyStatistics:
    """Of the rows of all blocks [N, ...] together, in one pass and float64; `count` is their number."""
    low, high, mean, squares, count = np.array(np.inf), np.array(-np.inf), np.array(0.0), np.array(0.0), 0
    for block in blocks:
        values = np.asarray(block, dtype=np.float64)
        low, high = np.minimum(low, values.min(axis=0)), np.maximum(high, values.max(axis=0))
        # Chan, Golub and LeVeque 1979: the exact merge of two sets' means and sums of squared deviations.
        shift, share = values.mean(axis=0) - mean, len(values) / (count + len(values))
        squares = squares + ((values - values.mean(axis=0)) ** 2).sum(axis=0) + shift**2 * count * share
        mean, count = mean + shift * share, count + len(values)
    constant = low == high
    std = np.where(constant, 0.0, np.sqrt(squares / max(1, count)))
    return KeyStatistics(low, high, np.where(constant, low, mean), std, count)


def _of_key(buffer: ReplayBuffer, key: str, mask: NDArray[np.bool_]) -> KeyStatistics:
    found = statistics_of(_samples(buffer, key, mask))
    return replace(found, count=int(buffer.episode_lengths[mask].sum()))


def _samples(buffer: ReplayBuffer, key: str, mask: NDArray[np.bool_]) -> Iterator[Vector]:
    array = buffer.array(key)
    for start, block in _episode_blocks(buffer, array, mask):
        bad = non_finite_rows(block)
        if bad.size:
            raise non_finite_error(buffer.source, key, start + int(bad[0]), buffer.episode_ends)
        yield _as_samples(array, block)


def _episode_blocks(buffer: ReplayBuffer, array: Array, mask: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[Any]]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield from blocks(array, int(buffer.episode_starts[first]), int(buffer.episode_ends[last - 1]))


def _as_samples(array: Array, block: NDArray[Any]) -> Vector:
    shape = (-1, block.shape[-1]) if is_image(array) else (len(block), *(block.shape[1:] or (1,)))
    values = block.reshape(shape)
    return np.asarray(values, dtype=np.float64)
