"""Runs that `flowsteer eval` has judged: scores, curves, means over their training seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsteer.cli.errors import UsageError
from flowsteer.cli.run_log import METRICS, read_metrics
from flowsteer.sim.plots import save_figure
from flowsteer.sim.results import EVAL_JSON

SCORES = ("max_reward", "success", "return")
PLOTTED = SCORES[:2]
Run = dict[str, Any]


def check_runs(names: Sequence[str]) -> list[Path]:
    """The run folders of an option `runs`.

    Raises:
        UsageError: there is none.
    """
    if not names:
        raise UsageError("runs= is missing: name run folders, 'runs=[runs/a,runs/b]'")
    return [Path(name) for name in names]


def earlier_results(names: Sequence[str]) -> list[dict[str, Any]]:
    """Results of a benchmark of runs, of an option `earlier`: what made each, and its `runs`.

    Raises:
        UsageError: one is no such result.
    """
    return [_earlier(Path(name)) for name in names]


def _earlier(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
        return {name: result[name] for name in ("command", "machine", "versions", "runs")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"earlier={file} is no result of gathered runs: name a json of flowsteer bench") from error


def judged(folder: Path, evaluation: str) -> dict[str, Any]:
    """What is in the results of an evaluation within a run folder.

    Raises:
        UsageError: nobody has judged the run.
    """
    file = folder / evaluation / EVAL_JSON
    if not file.is_file():
        named = re.fullmatch(r"eval-(\d+)x(\d+)", evaluation)
        said = f" episodes={named[1]} seed={named[2]}" if named else f" out={folder / evaluation}"
        raise UsageError(f"{file} is missing: make it with flowsteer eval checkpoint={folder}{said}")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def by_step(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run, one row per step."""
    merged: dict[int, dict[str, float]] = {}
    for row in read_metrics(folder / METRICS):
        merged.setdefault(row["step"], {}).update(row)
    return [row for _, row in sorted(merged.items())]


def target_name(config: Mapping[str, Any]) -> str:
    """The class that a config builds."""
    return str(config["_target_"]).rsplit(".", 1)[-1]


def grouped(runs: Iterable[Run], *names: str) -> list[list[Run]]:
    """Runs that are alike in all of `names`, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return list(groups.values())


def spread(means: Sequence[float]) -> dict[str, float]:
    """Mean over training seeds, the lowest and the highest of them."""
    return {"mean": float(np.mean(means)), "lowest": min(means), "highest": max(means)}


def plot_curves(groups: Mapping[str, Sequence[Run]], x: str, scores: Sequence[str], xlabel: str, file: Path) -> None:
    """The evaluations during training of each group of runs, in one colour: a picture for each of `scores`."""
    figure = Figure(figsize=(6.4 * len(scores), 4.2), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        for number, (label, runs) in enumerate(groups.items()):
            _plot_group(axes, runs, x, score, f"C{number}", label)
        axes.set(xlabel=xlabel, ylabel=score.replace("_", " "))
        if score != "return":
            axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        # Above the picture, where no curve is.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")
    save_figure(figure, file, dpi=110)


def _plot_group(axes: Axes, runs: Sequence[Run], x: str, score: str, color: str, label: str) -> None:
    for number, run in enumerate(runs):
        points = [(point[x], point[score]) for point in run["curve"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=None if number else label)
