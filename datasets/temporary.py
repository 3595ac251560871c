"""Writing that leaves all or nothing, and arrays that live on disk while they are used."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets.errors import DataError


@contextmanager
def replaced_by(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `target` to write a file or folder to; renamed to `target` at the end.

    overwrite: an older file of that name, never a folder, is replaced, and stays if writing fails.

    Raises:
        DataError: if `target` exists otherwise, or writing failed (full disk, no permission); the temporary is removed.
    """
    if not (overwrite and target.is_file()):
        check_absent(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{target}: cannot be written ({reason}): free disk space or choose another place") from error
    finally:
        remove(partial)


def check_absent(target: Path) -> None:
    """Refuse to write where something is.

    Raises:
        DataError: if `target` exists.
    """
    if target.exists():
        raise DataError(f"{target}: already exists: remove it or choose another name")


@final
class ForgivingFile(io.FileIO):
    """A file for HDF5 to write to, which crashes the process if it cannot finish a file: after the first failed write
    every further one is dropped, and `raise_error` tells what happened.
    """

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all, or pretend to."""
        return self._forgive(self._write_all, memoryview(data).cast("B"), len(data))

    def truncate(self, size: int | None = None) -> int:
        """Resize, or pretend to."""
        return self._forgive(super().truncate, size, size or 0)

    def _write_all(self, data: memoryview) -> int:
        # A raw file may write less than it was given, and HDF5 does not look.
        done = 0
        while done < len(data):
            done += super().write(data[done:])
        return done

    def _forgive(self, change: Callable[[Any], int], argument: Any, pretended: int) -> int:
        if self._error is None:
            try:
                return change(argument)
            except OSError as error:
                self._error = error
        return pretended

    def raise_error(self) -> None:
        """Raise the first failure, if there was one.

        Raises:
            OSError: of the failed write.
        """
        if self._error is not None:
            raise self._error


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # Where the folder that it should lie in is a file, it cannot be there.
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def has_room(size: int) -> bool:
    """Whether the temporary folder has `size` bytes to spare."""
    return shutil.disk_usage(tempfile.gettempdir()).free > size


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any], *, in_memory: bool) -> NDArray[Any]:
    """An array to fill: in memory, or memory-mapped to a nameless file in the temporary folder ($TMPDIR).

    Raises:
        DataError: if the temporary folder has no room.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if in_memory or size == 0:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        try:
            # Reserve the blocks now: a full disk is an error here and would be a bus error at a later write.
            reserve = getattr(os, "posix_fallocate", lambda descriptor, _, length: os.ftruncate(descriptor, length))
            reserve(file.fileno(), 0, size)
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: no room for {size / 2**30:.1f} GiB of images ({error.strerror}): "
                f"set TMPDIR to a folder on a larger disk"
            ) from error
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
