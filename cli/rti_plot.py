"""The picture of `flowsteer rti`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsteer.sim.plots import save_figure

PANELS = {
    "success": "success",
    "max_reward": "mean maximum reward",
    "seam_share": "seam, share of the action's range",
    "contraction": "error of the guess that is left",
}


def plot(title: str, rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None, file: Path) -> None:
    """Each measure against the start, a line for each number of steps; dashed: the policy itself, the first row."""
    reference, *tried = rows
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    for axes, (name, ylabel) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        if reference[name] is not None:
            axes.axhline(_mean(reference[name]), color="black", linestyle="--", label=f"{reference['steps']} steps")
        for line, series in enumerate(dict.fromkeys((row["steps"], row["renoise"]) for row in tried)):
            _line(axes, [row for row in tried if (row["steps"], row["renoise"]) == series], name, f"C{line}")
        if chosen is not None:
            axes.axvline(chosen["start"], color="grey", linewidth=0.8, label="chosen start")
        axes.set(xlabel="start", ylabel=ylabel, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"{title}; bands: 95 % interval over the episodes", fontsize="medium")
    save_figure(figure, file, dpi=110)


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, color: str) -> None:
    known = sorted((row for row in rows if row[name] is not None), key=lambda row: float(row["start"]))
    starts, steps = [row["start"] for row in known], rows[0]["steps"]
    label = f"{steps} step{'s' * (steps > 1)}{'' if rows[0]['renoise'] else ', not re-noised'}"
    axes.plot(starts, [_mean(row[name]) for row in known], marker="o", markersize=3, color=color, label=label)
    if known and isinstance(known[0][name], Mapping):
        axes.fill_between(
            starts, [row[name]["low"] for row in known], [row[name]["high"] for row in known], alpha=0.15, color=color
        )


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)
