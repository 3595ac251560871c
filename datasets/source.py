"""What a file format has to tell before anything is read: its columns, its episode ends, its facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import zarr
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError


@final
@dataclass(frozen=True)
class Column:
    """One array on disk.

    length: number of frames it says it has.
    shape, dtype: of one frame, as stored.
    blocks: reads all frames in order, in pieces; each call starts anew.
    by_default: loaded when no keys are named; if not, `note` says why.
    in_place: a zarr array that may be read where it lies, because every frame is a chunk of its own.
    """

    length: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[NDArray[Any]]]
    by_default: bool = True
    note: str = ""
    in_place: zarr.Array[Any] | None = None


@final
@dataclass(frozen=True)
class Source:
    """An opened, not yet read data set; `meta` as in `ReplayBuffer`.

    check: raises DataError for what only this format can tell is wrong (clock, missing pieces); skipped when a
        person asks for the data as they are.
    """

    path: Path
    columns: dict[str, Column]
    episode_ends: NDArray[np.int64]
    meta: dict[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


@final
@dataclass(frozen=True)
class Reader:
    """A format: `accepts` looks at a path's form (cheaply), `open` describes what is there.

    `open` raises DataError naming the file and the remedy for what it looks for; whatever else goes wrong in it is
    turned into one by `opening.open_source`.
    """

    name: str
    accepts: Callable[[Path], bool]
    open: Callable[[Path], Source]


def whole_ends(ends: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """Stored episode ends as int64 [E].

    Raises:
        DataError: if they are anything but whole numbers in a row.
    """
    # NaN and infinity leave no remainder of 0.
    with np.errstate(invalid="ignore"):
        if ends.ndim != 1 or ends.dtype.kind not in "fiu" or (ends % 1 != 0).any():
            raise DataError(
                f"{path}: key 'episode_ends' must be whole numbers [E], got {ends.dtype} {list(ends.shape)}: "
                f"store the frame after each episode's last one"
            )
    return ends.astype(np.int64)
