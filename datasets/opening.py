"""Open demonstrations of any known format, and convert between formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets import demo_hdf5, images, lerobot, minari_hdf5, npz_file, zarr_store
from flowsteer.datasets.errors import DataError, in_one_line
from flowsteer.datasets.progress import ProgressBar
from flowsteer.datasets.replay_buffer import Array, ReplayBuffer, check_episode_ends, missing_key_error
from flowsteer.datasets.source import Column, Reader, Source
from flowsteer.datasets.temporary import allocate, check_absent, has_room

# The first that accepts a path opens it: a Minari file is also an HDF5 file, a zipped zarr store also an archive.
READERS: tuple[Reader, ...] = (
    minari_hdf5.READER,
    demo_hdf5.READER,
    lerobot.READER,
    zarr_store.READER,
    npz_file.READER,
)
WRITERS: dict[str, Callable[[ReplayBuffer, Path], Path]] = {
    ".zarr": zarr_store.write_zarr,
    ".hdf5": demo_hdf5.write_robomimic,
    ".h5": demo_hdf5.write_robomimic,
}


def open_dataset(
    path: Path | str,
    *,
    keys: Sequence[str] | None = None,
    in_memory: bool = True,
    image_size: tuple[int, int] | None = None,
    strict: bool = True,
) -> ReplayBuffer:
    """Read demonstrations; the format is recognised by its form.

    Args:
        path: a file or folder, or `minari:ID`.
        keys: what to load; None loads everything but absent videos and `next_obs/*`.
        in_memory: False keeps images on disk, unpacked once into a memory-mapped temporary file (in $TMPDIR). Where
            there is no room for it, a zarr store with one frame per chunk is read in place, a hundred times slower.
        image_size: (height, width) that camera frames are resized to; None leaves them.
        strict: False accepts NaN and infinite values, uneven clocks and missing zarr chunks as they are.

    Raises:
        DataError: one line naming the file, the key and the remedy.
    """
    source = open_source(path)
    wanted = [key for key, column in source.columns.items() if column.by_default] if keys is None else list(keys)
    for key in wanted:
        if key not in source.columns:
            raise missing_key_error(str(path), key, source.columns)
    check_episode_ends(np.asarray(source.episode_ends), {key: source.columns[key].length for key in wanted}, str(path))
    if strict:
        source.check()
    data = {key: _load(source, key, in_memory=in_memory, image_size=image_size) for key in wanted}
    return ReplayBuffer(data, source.episode_ends, {**source.meta, "source": str(path)}, check_finite=strict)


def open_source(path: Path | str) -> Source:
    """Recognise the format and describe what is there, reading as little as possible.

    Raises:
        DataError: if nothing is there, no reader knows the form, or the file is damaged.
    """
    try:
        # Path() would drop nothing of `minari:ID`, and pathlib keeps its slashes.
        source = _reader(Path(path).expanduser()).open(Path(path).expanduser())
    except DataError:
        raise
    except Exception as error:  # each format's library fails in its own ways over what it did not expect
        raise DataError(
            f"{path}: cannot be read ({in_one_line(error)}): it is damaged or departs from its format; "
            f"copy, download or convert it again"
        ) from error
    return replace(source, columns={key: _if_numbers(path, key, column) for key, column in source.columns.items()})


def _reader(path: Path) -> Reader:
    for reader in READERS:
        if reader.accepts(path):
            return reader
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder: check the path, or fetch a public set with `flowsteer data fetch`"
        )
    inner = [child for child in sorted(path.iterdir()) if _known(child)] if path.is_dir() else []
    if inner:
        raise DataError(f"{path}: this folder only holds the data set: give {inner[0]}")
    known = ", ".join(reader.name for reader in READERS)
    raise DataError(f"{path}: not a data set of a known form ({known}): convert it, see docs/data.md")


def _if_numbers(path: Path | str, key: str, column: Column) -> Column:
    """Text, dates and the like are told of, but only refused where somebody names them."""
    if column.dtype.kind in "fiub":
        return column
    refuse = partial(_refuse, f"{path}: key '{key}' holds {column.dtype} and not numbers: leave it out or encode it")
    return replace(column, blocks=refuse, by_default=False, note="not numbers")


def _refuse(reason: str) -> Iterator[NDArray[Any]]:
    raise DataError(reason)


def _known(path: Path) -> bool:
    return any(reader.accepts(path) for reader in READERS)


def convert(
    source: Path | str, target: Path | str, change: Callable[[ReplayBuffer], ReplayBuffer] = lambda buffer: buffer
) -> Path:
    """Write the demonstrations at `source` in the format that the name of `target` asks for (.zarr, .hdf5, .h5).

    change: makes of what was read what is written.

    Raises:
        DataError: if either is wrong; then nothing is left behind at `target`.
    """
    suffix = Path(target).suffix
    if suffix not in WRITERS:
        raise DataError(f"{target}: cannot tell the format from '{suffix}': end the name in {', '.join(WRITERS)}")
    check_absent(Path(target))
    return WRITERS[suffix](change(open_dataset(source, in_memory=False)), Path(target))


def _load(source: Source, key: str, *, in_memory: bool, image_size: tuple[int, int] | None) -> Array:
    column, name = source.columns[key], f"{source.path}: key '{key}'"
    if column.in_place is not None and not in_memory and image_size is None and not has_room(column.in_place.nbytes):
        return column.in_place
    is_image, frames = prepared(column, name)
    if is_image:
        frames = (images.resize(block, image_size) for block in frames)
    return _fill(column.length, frames, name, in_memory=in_memory or not is_image)


def prepared(column: Column, name: str) -> tuple[bool, Iterator[NDArray[Any]]]:
    """The column's blocks, camera frames as uint8 [n, H, W, C]; and whether they are camera frames."""
    frames = guarded(column, name)
    if not images.may_be_image(column.shape, column.dtype):
        return False, frames
    first = next(frames, None)
    if first is None or not (first.dtype == np.uint8 or images.within_byte_range(first)):
        return False, frames if first is None else chain([first], frames)
    frames = (images.channels_last(block) for block in chain([first], frames))
    return True, images.as_uint8(frames, name)


def guarded(column: Column, name: str) -> Iterator[NDArray[Any]]:
    """The column's blocks; whatever a library raises for damaged bytes becomes a DataError naming `name`."""
    try:
        yield from column.blocks()
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} cannot be read ({in_one_line(error)}): the file is damaged, copy or download it again"
        ) from error


def _fill(length: int, frames: Iterator[NDArray[Any]], name: str, *, in_memory: bool) -> NDArray[Any]:
    filled, array = 0, np.empty(0)
    with ProgressBar(f"reading {name}", length, "frames") as bar:
        for block in frames:
            if filled == 0:
                array = allocate((length, *block.shape[1:]), block.dtype, in_memory=in_memory)
            if filled + len(block) > length or block.shape[1:] != array.shape[1:]:
                raise DataError(f"{name} does not fit {array.shape}: the file is damaged, copy or download it again")
            array[filled : filled + len(block)] = block
            filled += len(block)
            bar.advance(len(block))
    if filled != length:
        raise DataError(f"{name} has {filled} of {length} frames: the file is incomplete, copy or download it again")
    return array
