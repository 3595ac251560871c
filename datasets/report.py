"""What a person wants to know about demonstrations before training on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError
from flowsteer.datasets.opening import open_source, prepared
from flowsteer.datasets.replay_buffer import ACTION, check_episode_ends
from flowsteer.datasets.source import Column, Source

ROBUST_SIGMAS = 6.0
MAD_TO_SIGMA = 1.4826
HEAVY_TAIL_SHARE = 0.05
CHANNELS_READ = 256


@final
@dataclass(frozen=True)
class ChannelReport:
    """One channel of a key; statistics over the finite values of its `frames`."""

    name: str
    frames: int
    low: float
    high: float
    mean: float
    std: float
    non_finite: int
    outliers: int
    first_outlier: int | None

    @property
    def constant(self) -> bool:
        """One and the same value in every frame."""
        return self.low == self.high

    @property
    def has_outliers(self) -> bool:
        """A few values lie far off; where many do, that is the shape of the distribution."""
        return 0 < self.outliers <= HEAVY_TAIL_SHARE * self.frames


@final
@dataclass(frozen=True)
class KeyReport:
    """One key: `channels` of its flattened frames; `first_frame` uint8 [H, W, C] for images, which have no channels."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    channels: tuple[ChannelReport, ...] = ()
    first_frame: NDArray[np.uint8] | None = None
    note: str = ""


@final
@dataclass(frozen=True)
class Report:
    """A data set at a glance.

    lengths: frames per episode [E]. noop_share: of all steps, those whose action is zero or repeats the one before.
    actions: [N, Da], for plots; None without an action. problem: what `open_dataset` would refuse, or None.
    """

    path: str
    meta: dict[str, Any]
    lengths: NDArray[np.int64]
    keys: tuple[KeyReport, ...]
    noop_share: float | None
    actions: NDArray[Any] | None
    problem: str | None

    @property
    def duration_s(self) -> float | None:
        """Recorded time, if the rate is known."""
        rate = self.meta.get("control_hz")
        return float(self.lengths.sum() / rate) if rate else None


def inspect(path: Path | str) -> Report:
    """Look at the data set at `path`: every value of low-dimensional keys, the first frame of images.

    Raises:
        DataError: if it cannot be opened. NaN values and uneven clocks are reported, not raised.
    """
    source = open_source(path)
    check_episode_ends(
        np.asarray(source.episode_ends), {key: column.length for key, column in source.columns.items()}, str(path)
    )
    names = source.meta.get("names", {})
    lengths = np.diff(source.episode_ends, prepend=0)
    actions = _values(source, ACTION) if ACTION in source.columns else None
    return Report(
        path=str(path),
        meta=source.meta,
        lengths=lengths,
        keys=tuple(_key_report(source, key, column, names.get(key)) for key, column in source.columns.items()),
        noop_share=None if actions is None else noop_share(actions, source.episode_ends),
        actions=actions,
        problem=_problem(source),
    )


def _problem(source: Source) -> str | None:
    try:
        source.check()
    except DataError as error:
        return str(error)
    return None


def _values(source: Source, key: str) -> NDArray[Any]:
    _, blocks = prepared(source.columns[key], f"{source.path}: key '{key}'")
    return np.concatenate(list(blocks))


def _key_report(source: Source, key: str, column: Column, names: list[str] | None) -> KeyReport:
    dtype = str(column.dtype)
    if not column.by_default:
        return KeyReport(key, column.shape, dtype, note=column.note)
    is_image, blocks = prepared(column, f"{source.path}: key '{key}'")
    if is_image:
        return KeyReport(key, column.shape, dtype, first_frame=next(blocks)[0])
    values = np.concatenate(list(blocks)).reshape(column.length, -1)
    labels = names or [str(number) for number in range(values.shape[1])]
    shown = zip(labels, values.T[:CHANNELS_READ], strict=False)
    channels = tuple(channel_report(label, channel) for label, channel in shown)
    left_out = values.shape[1] - len(channels)
    return KeyReport(key, column.shape, dtype, channels, note=f"{left_out} more channels" if left_out else "")


def channel_report(name: str, values: NDArray[Any]) -> ChannelReport:
    """Statistics of one channel [N]; outliers lie more than 6 robust sigmas (1.4826 MAD) from the median."""
    numbers = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(numbers)
    kept = numbers[finite]
    if not kept.size:
        return ChannelReport(name, len(numbers), np.nan, np.nan, np.nan, np.nan, len(numbers), 0, None)
    distance = np.abs(np.where(finite, numbers, np.median(kept)) - np.median(kept))
    sigma = MAD_TO_SIGMA * float(np.median(distance[finite]))
    # Where most values are equal (grippers, contacts) the robust sigma is 0 and says nothing about outliers.
    outliers = np.flatnonzero(distance > ROBUST_SIGMAS * sigma) if sigma > 0 else np.empty(0, np.int64)
    first = int(outliers[0]) if outliers.size else None
    low, high, mean, std = (float(value) for value in (kept.min(), kept.max(), kept.mean(), kept.std()))
    return ChannelReport(name, len(numbers), low, high, mean, std, int((~finite).sum()), len(outliers), first)


def noop_share(actions: NDArray[Any], episode_ends: NDArray[np.int64]) -> float:
    """Share of steps whose action is all zero (deltas) or equals the one before in its episode (absolute targets)."""
    flat = actions.reshape(len(actions), -1)
    repeats = np.zeros(len(flat), bool)
    repeats[1:] = (flat[1:] == flat[:-1]).all(axis=1)
    repeats[episode_ends[:-1]] = False
    return float((repeats | (flat == 0).all(axis=1)).mean())
