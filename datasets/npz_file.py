"""A plain NumPy archive: arrays [N, ...] and `episode_ends` [E]; no pickled objects."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError
from flowsteer.datasets.minari_hdf5 import NAMES
from flowsteer.datasets.source import Column, Reader, Source

ENDS = "episode_ends"


def accepts(path: Path) -> bool:
    """A zip file whose members are all `.npy`."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    return all(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist())


def open_source(path: Path) -> Source:
    """Describe the archive; per-episode arrays are not columns and are left out.

    Raises:
        DataError: if `episode_ends` is missing or an array holds Python objects.
    """
    with np.load(path, allow_pickle=False) as archive:
        if ENDS not in archive:
            raise DataError(f"{path}: there is no key '{ENDS}': add it, the frame after each episode's last one")
        ends = archive[ENDS].astype(np.int64)
        names = [name for name in archive.files if name != ENDS]
        columns = {NAMES.get(name, name): _column(path, archive[name], name) for name in names if archive[name].ndim}
    per_episode = len(ends) if len(ends) != ends[-1:].sum() else -1
    per_frame = {key: column for key, column in columns.items() if column.length != per_episode}
    return Source(path, per_frame, ends, {"format": "NumPy archive"})


def _column(path: Path, array: NDArray[Any], name: str) -> Column:
    def read() -> Iterator[NDArray[Any]]:
        with np.load(path, allow_pickle=False) as archive:
            yield archive[name]

    return Column(len(array), array.shape[1:], array.dtype, read)


READER = Reader("NumPy archive", accepts, open_source)
