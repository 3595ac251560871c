"""Minari data sets: a folder with `data/main_data.hdf5` and `data/metadata.json`, or `minari:ID` through the package.

Keys: `observations` as `observation` (a dictionary space by its bare names), `actions` as `action`, `rewards` as
`reward`, `terminations` as `terminated`, `truncations` as `truncated`. Minari keeps one observation more than actions;
the last of each episode is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets import json_text
from flowsteer.datasets.demo_hdf5 import open_hdf5
from flowsteer.datasets.errors import DataError
from flowsteer.datasets.images import decode
from flowsteer.datasets.replay_buffer import ACTION
from flowsteer.datasets.source import Column, Reader, Source

MAIN_FILE = "main_data.hdf5"
SCHEME = "minari:"
NAMES = {
    "actions": ACTION,
    "rewards": "reward",
    "terminations": "terminated",
    "truncations": "truncated",
    "observations": "observation",
}


def accepts(path: Path) -> bool:
    """`minari:ID`, the data set's folder, its `data` folder, or the HDF5 file itself."""
    return str(path).startswith(SCHEME) or _main_file(path) is not None


def _main_file(path: Path) -> Path | None:
    candidates = (path, path / MAIN_FILE, path / "data" / MAIN_FILE)
    return next((file for file in candidates if file.is_file() and file.name == MAIN_FILE), None)


def open_source(path: Path) -> Source:
    """Describe the data set.

    Raises:
        DataError: if the package is needed and absent, or the file is truncated or foreign.
    """
    file = _main_file(_local_folder(str(path)) if str(path).startswith(SCHEME) else path)
    if file is None:
        raise DataError(
            f"{path}: no {MAIN_FILE} there: only Minari's HDF5 form is read, create it with that data_format"
        )
    with open_hdf5(file) as content:
        episodes = sorted((name for name in content if name.startswith("episode_")), key=lambda name: (len(name), name))
        if not episodes or "actions" not in content[episodes[0]]:
            raise DataError(f"{file}: no 'episode_*/actions' there: this is not a Minari data set")
        lengths = [len(content[name]["rewards"]) for name in episodes]
        names = [name for name in _dataset_names(content[episodes[0]]) if name.split("/")[0] in NAMES]
        columns = {_key(name): _column(file, content, episodes, lengths, name) for name in names}
    return Source(
        file, columns, np.cumsum(lengths), {"format": "Minari HDF5", **_meta(file.with_name("metadata.json"))}
    )


def _local_folder(name: str) -> Path:
    try:
        minari = importlib.import_module("minari")
    except ImportError as error:
        raise DataError(f"{name}: needs the package minari: pip install 'flowsteer[minari]'") from error
    try:
        return Path(minari.load_dataset(name.removeprefix(SCHEME), download=True).storage.data_path)
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded or downloaded ({error}): check the name with `minari list`"
        ) from error


def _dataset_names(episode: h5py.Group) -> list[str]:
    names: list[str] = []
    episode.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _key(name: str) -> str:
    return NAMES.get(name, name.removeprefix("observations/"))


def _column(file: Path, content: h5py.File, episodes: list[str], lengths: list[int], name: str) -> Column:
    def read() -> Iterator[NDArray[Any]]:
        with open_hdf5(file) as data:
            for episode, length in zip(episodes, lengths, strict=True):
                yield _frames(data[episode][name], length)

    sample = _frames(content[episodes[0]][name], 1)
    available = sum(min(length, len(content[episode][name])) for episode, length in zip(episodes, lengths, strict=True))
    return Column(available, sample.shape[1:], sample.dtype, read)


def _frames(dataset: h5py.Dataset, length: int) -> NDArray[Any]:
    values = dataset[:length]
    if values.dtype != object:
        return np.asarray(values)
    return np.stack([decode(bytes(encoded)) for encoded in values])


def _meta(path: Path) -> dict[str, Any]:
    known = json_text.parse(path.read_text(), str(path)) if path.is_file() else {}
    meta = {key: known[key] for key in ("dataset_id", "minari_version") if key in known}
    if known.get("env_spec"):
        meta["env_spec"] = json_text.parse(known["env_spec"], f"{path}: 'env_spec'")
    return meta


READER = Reader("Minari", accepts, open_source)
