"""A report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from rich.console import Console, Group
from rich.table import Table

from flowsteer.datasets.report import ChannelReport, KeyReport, Report

NAMES_SHOWN = 6
KEY_WIDTH = 26

Complaint = tuple[str, Callable[[ChannelReport], bool], Callable[[ChannelReport], str]]
COMPLAINTS: tuple[Complaint, ...] = (
    (
        "NaN or infinite",
        lambda channel: channel.non_finite > 0,
        lambda channel: f"{channel.name} ({channel.non_finite})",
    ),
    ("constant", lambda channel: channel.constant, lambda channel: f"{channel.name} ({channel.low:.4g})"),
    (
        "outliers",
        lambda channel: channel.has_outliers,
        lambda channel: f"{channel.name} ({channel.outliers}, the first at frame {channel.first_outlier})",
    ),
)


def render(report: Report) -> Group:
    """Overview, one row per key, and the channels to look at."""
    tables = (_overview(report), _keys(report), _complaints(report.keys))
    return Group(*(table for table in tables if table.row_count))


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the tables."""
    (console or Console()).print(render(report))


def _overview(report: Report) -> Table:
    lengths, rate = report.lengths, report.meta.get("control_hz")
    facts = {
        "data set": report.path,
        "format": report.meta.get("format", ""),
        "robot, task": report.meta.get("env_args", {}).get("env_name") or report.meta.get("robot", ""),
        "episodes": f"{len(lengths)}, {lengths.sum()} frames",
        "frames each": f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}",
        "rate": f"{rate:g} Hz, {report.duration_s:.0f} s in all" if rate else "not told by the file",
        "no-op actions": "no action" if report.noop_share is None else f"{report.noop_share:.1%} of steps",
        "problem": report.problem or "none in the file's structure",
    }
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, value)
    return table


def _keys(report: Report) -> Table:
    table = Table()
    table.add_column("key", overflow="fold", min_width=min(KEY_WIDTH, max(len(key.key) for key in report.keys)))
    for name in ("shape", "dtype", "lowest", "highest", "note"):
        table.add_column(name, overflow="fold", justify="right" if name.endswith("est") else "left")
    for key in report.keys:
        shape = "x".join(map(str, key.shape)) or "-"
        lows, highs = ([getattr(channel, side) for channel in key.channels] for side in ("low", "high"))
        table.add_row(key.key, shape, key.dtype, _number(np.nanmin, lows), _number(np.nanmax, highs), key.note)
    return table


def _number(reduce: Callable[[list[float]], float], values: list[float]) -> str:
    return f"{reduce(values):.4g}" if np.isfinite(values).any() else ""


def _complaints(keys: Iterable[KeyReport]) -> Table:
    table = Table("key", "what", "channels", title="to look at", title_justify="left")
    for key in keys:
        for title, applies, describe in COMPLAINTS:
            found = [describe(channel) for channel in key.channels if applies(channel)]
            more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
            if found:
                table.add_row(key.key, title, ", ".join(found[:NAMES_SHOWN]) + more)
    return table
