"""Progress bars for long reads, writes and downloads: on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress_bar(label: str, total: int | None, *, unit_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar; nothing is shown where the output is not a terminal."""
    console = Console(stderr=True)
    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if unit_bytes:
        counts = (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda steps: progress.update(task, advance=steps)
