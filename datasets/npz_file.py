"""A plain NumPy archive: arrays [N, ...] and `episode_ends` [E]; no pickled objects."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError
from flowsteer.datasets.minari_hdf5 import NAMES
from flowsteer.datasets.source import Column, Reader, Source, whole_ends

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
    arrays = _load(path)
    if ENDS not in arrays:
        raise DataError(f"{path}: there is no key '{ENDS}': add it, the frame after each episode's last one")
    ends = whole_ends(arrays.pop(ENDS), path)
    columns = {NAMES.get(name, name): _column(array) for name, array in arrays.items() if array.ndim}
    per_episode = len(ends) if len(ends) != ends[-1:].sum() else -1
    per_frame = {key: column for key, column in columns.items() if column.length != per_episode}
    return Source(path, per_frame, ends, {"format": "NumPy archive"})


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: the archive cannot be read ({error}): save plain arrays, or copy it again") from error


def _column(array: NDArray[Any]) -> Column:
    return Column(len(array), array.shape[1:], array.dtype, lambda: iter([array]))


READER = Reader("NumPy archive", accepts, open_source)
