"""Diffusion Policy's replay buffer: a zarr group (format 2 or 3) with `data/*` [N, ...] and `meta/episode_ends` [E]."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import ZipStore

from flowsteer.datasets import json_text
from flowsteer.datasets.errors import DataError
from flowsteer.datasets.images import channel_axis
from flowsteer.datasets.replay_buffer import BLOCK_BYTES, Array, ReplayBuffer, is_image
from flowsteer.datasets.source import Column, Reader, Source, whole_ends
from flowsteer.datasets.temporary import replaced_by

GROUP_FILES = (".zgroup", "zarr.json")
SHARD_FRAMES = 32
"""Image chunks of one frame, this many to a file: readers fetch a shard's index for every chunk."""
CHUNK_BYTES = 1 << 20


def accepts(path: Path) -> bool:
    """A folder, or an uncompressed zip of it, with a zarr group's own file."""
    if path.is_dir():
        return any((path / name).is_file() for name in GROUP_FILES)
    return zipfile.is_zipfile(path) and any(name in GROUP_FILES for name in zipfile.ZipFile(path).namelist())


def open_source(path: Path) -> Source:
    """Describe the store at `path`.

    Raises:
        DataError: if it is no replay buffer or cannot be opened.
    """
    try:
        root = zarr.open_group(path if path.is_dir() else ZipStore(path, mode="r"), mode="r")
        absent = [name for name in ("data", "meta/episode_ends") if name not in root]
    except Exception as error:
        raise DataError(f"{path}: the zarr store cannot be opened ({error}): copy or download it again") from error
    if absent:
        raise DataError(f"{path}: this zarr store has no '{absent[0]}' and is no replay buffer: see docs/data.md")
    arrays = dict(zarr.open_group(root.store_path / "data", mode="r").arrays())
    ends = whole_ends(np.asarray(root["meta/episode_ends"][...]), path)  # type: ignore[index]
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f"{path}: key '{name}' is a single number and not one per frame: delete 'data/{name}'")
    return Source(
        path,
        {name: _column(array) for name, array in arrays.items()},
        ends,
        {**_read_meta(path, root), "format": f"zarr v{root.metadata.zarr_format}"},
        lambda: _check_chunks(path, arrays),
    )


def _column(array: zarr.Array[Any]) -> Column:
    def read() -> Iterator[NDArray[Any]]:
        step = _block_frames(array, array.chunks[0])
        for start in range(0, array.shape[0], step):
            yield np.asarray(array[start : start + step])

    per_frame = is_image(array) and channel_axis(array.shape[1:]) == 2 and array.chunks[0] == 1
    return Column(array.shape[0], array.shape[1:], array.dtype, read, in_place=array if per_frame else None)


def _check_chunks(path: Path, arrays: dict[str, zarr.Array[Any]]) -> None:
    """A missing chunk file would silently read as zeros."""
    for name, array in arrays.items():
        missing = array.nchunks - array.nchunks_initialized
        if missing > 0:
            raise DataError(
                f"{path}: key '{name}': {missing} of its chunks are missing and would read as zeros: copy the "
                f"store again (if its writer leaves out chunks of zeros, open it with strict=False)"
            )


def _read_meta(path: Path, root: zarr.Group) -> dict[str, Any]:
    told: Any = root.attrs.get("flowsteer", {})
    meta = dict(told)
    if "meta/episodes" in root:
        stored = bytes(np.asarray(root["meta/episodes"][:]))  # type: ignore[index]
        meta["episodes"] = json_text.parse(stored, f"{path}: 'meta/episodes'")
    return meta


def write_zarr(buffer: ReplayBuffer, path: Path | str, *, zarr_format: int = 3) -> Path:
    """Write `buffer` as a new store; images in chunks of one frame, so that any frame is one small read.

    zarr_format: 3 packs the image chunks into shards (few files); 2 is what Diffusion Policy's own code reads.

    Raises:
        DataError: if `path` exists or the disk is full; then nothing is left behind.
    """
    with replaced_by(Path(path)) as partial:
        root = zarr.open_group(partial, mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
        meta = {key: value for key, value in buffer.meta.items() if key not in ("episodes", "format")}
        root.attrs["flowsteer"] = meta
        _write(root, "meta/episode_ends", buffer.episode_ends)
        if "episodes" in buffer.meta:
            encoded = json.dumps(buffer.meta["episodes"]).encode()
            _write(root, "meta/episodes", np.frombuffer(encoded, np.uint8))
        for key, array in buffer.data.items():
            _write(root, f"data/{key}", array)
    return Path(path)


def _write(root: zarr.Group, name: str, array: Array) -> None:
    chunk = 1 if is_image(array) else max(1, min(array.shape[0], CHUNK_BYTES // _frame_bytes(array)))
    sharded = is_image(array) and root.metadata.zarr_format == 3
    target = root.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk, *array.shape[1:]),
        shards=(SHARD_FRAMES, *array.shape[1:]) if sharded else None,
        config={"write_empty_chunks": True},
    )
    # One file a call: zarr writes many at once, and those still under way when one fails would outlive the clean-up.
    step = SHARD_FRAMES if sharded else chunk
    for start in range(0, array.shape[0], step):
        target[start : start + step] = np.asarray(array[start : start + step])


def _frame_bytes(array: Array) -> int:
    return max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))


def _block_frames(array: Array, multiple: int) -> int:
    """Frames of about 16 MB, in whole chunks of `multiple` frames."""
    return multiple * max(1, BLOCK_BYTES // (multiple * _frame_bytes(array)))


READER = Reader("Diffusion Policy zarr", accepts, open_source)
