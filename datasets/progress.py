"""How far a long job is: a bar on a terminal, elsewhere a plain line every ten seconds, with rate and time left."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0


@final
class ProgressBar:
    """One job; use it as a context. A bar inside another is drawn below it.

    Args:
        label: what is going on.
        total: how much there is to do; None where nobody knows.
        unit: what is counted, in the plural.
        start: what is done already, and no part of the rate.
        first_line_s: off a terminal, a job that takes less leaves no line.
        console: where to; stderr when not given.
    """

    def __init__(
        self,
        label: str,
        total: float | None,
        unit: str,
        *,
        start: float = 0,
        first_line_s: float = LINE_EVERY_S,
        console: Console | None = None,
    ) -> None:
        self._label, self._total, self._unit, self._start = label, total, unit, start
        self._done, self._began = start, time.monotonic()
        self._line_at, self._lines = self._began + first_line_s, 0
        # Rich draws one display at a time.
        outer = _running[0]._display if _running else None
        self._display: Progress = outer or _display(console or Console(stderr=True, soft_wrap=True))
        self._task = self._display.add_task(escape(label), total=total, numbers=self._count())
        self._display.update(self._task, completed=start)
        _running.append(self)
        self._display.start()

    def advance(self, count: float = 1, text: str = "") -> None:
        """Say that `count` more is done, and `text` about it."""
        self.move(self._done + count, text)

    def move(self, done: float, text: str = "", *, keep: bool = False) -> None:
        """Say that `done` is done in all, and `text` about it; `keep` leaves it on a line of its own."""
        self._done = done
        numbers = "  ".join(filter(None, (self._count(), text, self._pace())))
        self._display.update(self._task, completed=done, numbers=escape(numbers))
        plain = not self._display.console.is_terminal
        last = self._lines > 0 and done == self._total
        if keep or (plain and (last or time.monotonic() >= self._line_at)):
            self._line_at, self._lines = time.monotonic() + LINE_EVERY_S, self._lines + 1
            self._display.console.print(f"{self._label} {numbers}", highlight=False, markup=False)

    def close(self) -> None:
        """Take the bar away; safe to call twice."""
        if self in _running:
            _running.remove(self)
            self._display.remove_task(self._task)
            if not _running:
                self._display.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self) -> str:
        of = "" if self._total is None else f"/{self._total:.0f}"
        return f"{self._done:.0f}{of} {self._unit}"

    def _pace(self) -> str:
        rate = (self._done - self._start) / max(1e-9, time.monotonic() - self._began)
        pace = f"{rate:.{1 if rate >= 1 else 3}f} {self._unit}/s"
        if self._total is None:
            return pace
        return f"{pace}  {format_duration(max(0.0, self._total - self._done) / rate if rate > 0 else math.inf)} left"


_running: list[ProgressBar] = []
"""The outermost bar first."""


def _display(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03 or 2:03; "?" where unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
