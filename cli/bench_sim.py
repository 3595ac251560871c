"""`flowsteer bench sim`: env steps per second of each back end, beside what others offer for the same task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_filled, check_positive
from flowsteer.cli.devices import find_device
from flowsteer.cli.sim_contenders import OTHERS, Size, Start, contenders
from flowsteer.cli.simulation import find_task
from flowsteer.datasets.progress import ProgressBar
from flowsteer.sim.plots import save_figure

ROUNDS = 3
PANELS = 3
"""In a row of the plot."""


@final
@dataclass
class SimBenchmark:
    """What to step with uniformly random actions.

    Attributes:
        tasks: names as in `flowsteer eval`.
        backends: each that a task can run in: gym, threads, ray, warp.
        num_envs: batch sizes.
        chunk_steps: control steps in a chunk.
        seconds: measured time of each contender in each of three rounds, of which the middle one counts.
        others_up_to: batches up to this size run beside Gymnasium's vector environments, of which one takes a process
            per environment, and arm_lift beside robosuite's lift on a process per core.
        device: of "warp", "auto" (a GPU where there is one) or "cpu".
        name: of the files to write.
        out: where to write them.
    """

    tasks: list[str] = field(default_factory=lambda: ["hopper"])
    backends: list[str] = field(default_factory=lambda: ["gym", "threads"])
    num_envs: list[int] = field(default_factory=lambda: [1, 16, 64])
    chunk_steps: int = 4
    seconds: float = 2.0
    others_up_to: int = 64
    device: str = "auto"
    name: str = "sim"
    out: str | None = None


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: one per task, batch size and contender, with its ratio to each of the `OTHERS` in the run."""
    check_filled(config, "tasks", "backends")
    check_positive(config, "num_envs", "chunk_steps", "seconds")
    races = list(_races(config))
    met = set().union(*(starts for _, _, starts in races))
    ratios = {ratio: other for ratio, other in OTHERS.items() if other in met}
    rows: list[dict[str, Any]] = []
    with ProgressBar("racing", len(races), "races") as bar:
        for name, num_envs, starts in races:
            rates = _race(starts, config.seconds)
            rows += [{"task": name, "num_envs": num_envs, **scores} for scores in _scores(rates, ratios)]
            bar.advance()
    return {"rows": rows, "chunk_steps": config.chunk_steps}


def _races(config: DictConfig) -> Iterator[tuple[str, int, dict[str, Start]]]:
    """Task, batch size and who can run it there; nothing is started."""
    device = find_device(config.device)
    for name, num_envs in product(config.tasks, config.num_envs):
        size, others = Size(num_envs, config.chunk_steps), num_envs <= config.others_up_to
        yield name, num_envs, contenders(find_task(name, {}), list(config.backends), size, device, others)


def _race(starts: Mapping[str, Start], seconds: float) -> dict[str, float]:
    """Env steps per second of each contender; they take turns, so that a disturbance meets all of them."""
    with ExitStack() as stack:
        laps = {contender: stack.enter_context(start) for contender, start in starts.items()}
        rounds = [[lap(seconds) for lap in laps.values()] for _ in range(ROUNDS)]
    return dict(zip(laps, np.median(rounds, axis=0).tolist(), strict=True))


def _scores(rates: Mapping[str, float], ratios: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Of each contender; a ratio to one that is not in this race is None."""
    for contender, rate in rates.items():
        shares = {ratio: _rounded(rate / rates[other]) if other in rates else None for ratio, other in ratios.items()}
        yield {"contender": contender, "env_steps_per_s": _rounded(rate), **shares}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Env steps per second against the number of environments, a panel per task."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    columns = min(PANELS, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(5 * columns, 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(tasks) :]:
        axes.remove()
    colours: dict[str, str] = {}
    for axes, task in zip(panels, tasks, strict=False):
        _panel(axes, task, [row for row in result["rows"] if row["task"] == task], colours)
    save_figure(figure, file, dpi=110)


def _panel(axes: Axes, task: str, rows: list[Mapping[str, Any]], colours: dict[str, str]) -> None:
    """A line per contender, which keeps its colour in every panel."""
    for contender in dict.fromkeys(row["contender"] for row in rows):
        points = [(row["num_envs"], row["env_steps_per_s"]) for row in rows if row["contender"] == contender]
        colour = colours.setdefault(contender, f"C{len(colours)}")
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=contender)
    axes.set(xlabel="environments", ylabel="env steps per second", title=task, xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


main = benchmark(
    "sim", "Env steps per second of each back end, beside Gymnasium's and robosuite's.", SimBenchmark, measure, plot
)
