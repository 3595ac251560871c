"""Files that appear whole or not at all, and what to tell of those that cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowsteer.sim.errors import SimError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` where the block cannot write it: the system's own error of a full disk names nothing.

    Raises:
        SimError: naming the path and the remedy.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SimError(f"{path} cannot be written ({reason}): free disk space or choose another place") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); it takes the place of `path` if the block succeeds.

    Raises:
        SimError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
