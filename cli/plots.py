"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsteer.sim.plots import save_figure

Rows = Sequence[Mapping[str, Any]]

LOSSES = {"train/loss": "training", "val/loss": "validation (averaged weights)"}
SCORES = {"eval/max_reward": "maximum reward", "eval/success": "success"}
"""Success on top: of a sparse reward they are the same."""
RETURNS = {"eval/return": "return"}
COLLECTED = {"collect/return": "return while exploring, of the reward that is learnt from"}
"""Each beside NAME_low and NAME_high, its 95 % interval. What is learnt from may be another reward."""


def plot_run(folder: Path, rows: Rows, unit: str = "steps") -> None:
    """Write loss, success, return and collect_return .png, each where there is something to show, against `unit`."""
    _draw(folder / "loss.png", rows, LOSSES, (unit, "loss"), logarithmic=True)
    mean = (unit, "mean over episodes, 95 % interval")
    _draw(folder / "success.png", rows, SCORES, mean, shares=True)
    _draw(folder / "return.png", rows, RETURNS, mean)
    _draw(folder / "collect_return.png", rows, COLLECTED, (unit, "mean over episodes"))


def _draw(
    file: Path,
    rows: Rows,
    names: Mapping[str, str],
    labels: tuple[str, str],
    *,
    logarithmic: bool = False,
    shares: bool = False,
) -> None:
    # No pyplot: its global state is neither needed nor safe beside other threads.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
    values = [value for name, title in names.items() for value in _curve(axes, rows, name, title)]
    if not values:
        return
    if logarithmic and min(values) > 0:
        axes.set_yscale("log")
    elif shares and min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    # Above the picture, where no curve is.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    save_figure(figure, file)


def _curve(axes: Axes, rows: Rows, name: str, title: str) -> list[float]:
    """Draw a curve and its interval; returns its values."""
    points = [row for row in rows if row.get(name) is not None]
    if not points:
        return []
    steps, values = [row["step"] for row in points], [row[name] for row in points]
    (line,) = axes.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=3, label=title)
    if all(row.get(f"{name}_low") is not None and row.get(f"{name}_high") is not None for row in points):
        low, high = [row[f"{name}_low"] for row in points], [row[f"{name}_high"] for row in points]
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    return values
