"""`flowsteer bench experts`: how often the scripted experts succeed, undisturbed and with noise on their actions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.checks import check_filled, check_not_negative, check_positive, check_seeds
from flowsteer.cli.errors import unknown
from flowsteer.cli.simulation import find_task
from flowsteer.datasets.progress import ProgressBar
from flowsteer.sim.collect import ActionNoise, collect
from flowsteer.sim.cores import usable_cores
from flowsteer.sim.experts import EXPERTS
from flowsteer.sim.plots import save_figure
from flowsteer.sim.statistics import wilson
from flowsteer.sim.tasks.base import Task


@final
@dataclass
class ExpertsBenchmark:
    """Which experts to judge.

    Attributes:
        tasks: those that have an expert.
        episodes: of each task and noise level; from the same seeds at each.
        seed: of the first episode; the others follow.
        noise: per task, standard deviations of the noise on all actions but the gripper's, in the task's units: in
            lift and can 1 is the largest displacement of a step, in arm_lift it is radians of the joints' targets.
        correlation: of the noise of one step with the step before, in [0, 1).
        pause_probability: per step, of a pause of 4 steps.
        workers: processes; as many as cores for heavy tasks if not given, 0 and 1 roll in this one.
        out: where to write experts.json and experts.png.
    """

    tasks: list[str] = field(default_factory=lambda: list(EXPERTS))
    episodes: int = 100
    seed: int = 0
    noise: dict[str, list[float]] = field(
        default_factory=lambda: {"lift": [0.0, 0.15, 0.3], "can": [0.0, 0.15, 0.3], "arm_lift": [0.0, 0.02, 0.05]}
    )
    correlation: float = 0.5
    pause_probability: float = 0.0
    workers: int | None = None
    out: str | None = None


def measure(config: DictConfig) -> dict[str, Any]:
    """`rows`: one per task and noise level, success with its 95 % Wilson interval; `failed`: seeds of what failed."""
    check_filled(config, "tasks")
    for name in config.tasks:
        if name not in EXPERTS:
            raise unknown("task with an expert", name, EXPERTS)
    check_positive(config, "episodes")
    check_seeds(config, "seed")
    check_not_negative(
        config, "workers", "pause_probability", "correlation", *(f"noise.{name}" for name in config.noise)
    )
    rows = [row for name in config.tasks for row in _judged(find_task(name, {}), config)]
    failed = [{"task": row["task"], "noise": row["noise"], "seeds": row.pop("failed")} for row in rows]
    options = {name: config[name] for name in ("episodes", "seed", "correlation", "pause_probability")}
    return {"rows": rows, "failed": failed, **options}


def _judged(task: Task, config: DictConfig) -> Iterator[dict[str, Any]]:
    """A row per noise level of the task."""
    name = task.spec.name
    workers = (usable_cores() if task.heavy else 1) if config.workers is None else config.workers
    for std in config.noise.get(name, [0.0]):
        noise, began = ActionNoise(std, config.correlation, config.pause_probability), time.perf_counter()
        with ProgressBar(f"{name}, noise {std:g}", config.episodes, "episodes") as bar:
            collected = collect(
                task,
                EXPERTS[name],
                episodes=config.episodes,
                seed=config.seed,
                num_workers=min(workers, config.episodes),
                noise=noise,
                only_successful=False,
                progress=lambda kept, tried, bar=bar: bar.move(kept),  # type: ignore[misc]
            )
        episodes = collected.meta["episodes"]
        lengths = np.diff(collected.episode_ends, prepend=0)
        yield {
            "task": name,
            "noise": std,
            "success": wilson(sum(episodes["success"]), config.episodes)._asdict(),
            "median_steps": float(np.median(lengths)),
            "env_steps": int(lengths.sum()),
            "wall_s": time.perf_counter() - began,
            "failed": [s for s, success in zip(episodes["seed"], episodes["success"], strict=True) if not success],
        }


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Success with its interval against the noise, a panel per task."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    figure = Figure(figsize=(4 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(panels, tasks, strict=True):
        _panel(axes, task, [row for row in result["rows"] if row["task"] == task])
    panels[0].set_ylabel(f"success over {result['episodes']} episodes, 95 % interval")
    save_figure(figure, file, dpi=110)


def _panel(axes: Axes, task: str, rows: list[Mapping[str, Any]]) -> None:
    mean, low, high = (np.array([row["success"][name] for row in rows]) for name in ("mean", "low", "high"))
    axes.errorbar([row["noise"] for row in rows], mean, yerr=[mean - low, high - mean], marker="o", capsize=4)
    axes.set(xlabel="standard deviation of the noise on actions", title=task, ylim=(0, 1.05))
    axes.grid(alpha=0.3)


main = benchmark("experts", "How often the scripted experts succeed, by noise.", ExpertsBenchmark, measure, plot)
