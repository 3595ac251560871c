"""Plots of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowsteer.policies.spec import PolicySpec
from flowsteer.sim.evaluate import Episode, Evaluation
from flowsteer.sim.files import replacing
from flowsteer.sim.statistics import wilson

MAX_CHANNELS = 12


def plot_episodes(evaluation: Evaluation, path: Path) -> None:
    """Success so far with its interval, and every episode's largest reward and return."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    success, largest, returns = figure.subplots(1, 3)
    _plot_success(success, [episode.success for episode in evaluation.kept])
    _plot_sorted(largest, evaluation, [episode.max_reward for episode in evaluation.kept], "largest reward")
    _plot_sorted(returns, evaluation, [episode.reward_sum for episode in evaluation.kept], "return")
    figure.suptitle(f"{evaluation.task}: {len(evaluation.kept)} episodes, delay {evaluation.delay_steps} steps")
    save_figure(figure, path)


def plot_episode(episode: Episode, prediction: PolicySpec, path: Path) -> None:
    """The executed actions over time, and every predicted chunk as a thin line where it was predicted."""
    executed = np.array(episode.actions).reshape(-1, prediction.action_dim)
    channels = min(MAX_CHANNELS, prediction.action_dim)
    figure = Figure(figsize=(9, 1.3 * channels + 0.8), layout="constrained")
    for channel, axes in enumerate(figure.subplots(channels, 1, sharex=True, squeeze=False)[:, 0]):
        for start, chunk in episode.decisions:
            steps = np.arange(len(chunk)) + start - prediction.executed.start
            axes.plot(steps / prediction.control_hz, chunk[:, channel], color="tab:blue", alpha=0.35, linewidth=0.8)
        axes.plot(np.arange(len(executed)) / prediction.control_hz, executed[:, channel], color="tab:orange")
        axes.set_ylabel(f"action {channel}")
    axes.set_xlabel("time [s]")
    outcome = "success" if episode.success else "no success"
    figure.suptitle(f"seed {episode.seed}: {outcome}, largest reward {episode.max_reward:.2f}; blue: predicted")
    save_figure(figure, path)


def _plot_success(axes: Axes, successes: Sequence[bool]) -> None:
    counts = np.cumsum(successes, dtype=int)
    intervals = np.array([wilson(int(count), n + 1) for n, count in enumerate(counts)]).reshape(-1, 3)
    numbers = np.arange(1, len(counts) + 1)
    axes.fill_between(numbers, intervals[:, 1], intervals[:, 2], alpha=0.25, label="95 % interval")
    axes.plot(numbers, intervals[:, 0], label="success")
    axes.set(xlabel="episodes", ylabel="success", ylim=(0, 1))
    axes.legend(loc="best")


def _plot_sorted(axes: Axes, evaluation: Evaluation, values: Sequence[float], name: str) -> None:
    """Every episode as a dot, worst to best; filled where it succeeded."""
    order = np.argsort(values)
    colours = np.where([episode.success for episode in evaluation.kept], "tab:green", "tab:red")
    axes.scatter(np.arange(1, len(order) + 1), np.array(values)[order], c=colours[order], s=14)
    axes.set(xlabel="episodes, worst to best (green: success)", ylabel=name)


def save_figure(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Write a picture that is whole or absent."""
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=dpi)
