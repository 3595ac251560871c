"""Policies side by side on the same episodes: a table, a plot and a file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from flowsteer.cli.files import write_json
from flowsteer.cli.simulation import judge, make_environments
from flowsteer.policies.policy import Policy
from flowsteer.sim.plots import save_figure
from flowsteer.sim.results import summary
from flowsteer.sim.tasks.base import Task

COMPARISON = "comparison.json"
SHOWN = ("success", "max_reward", "return")
KEPT = ("episodes", "lost", *SHOWN, "env_steps", "decision_ms", "decision_batch")


def compare(
    contenders: Mapping[str, Policy], task: Task, config: DictConfig, folder: Path, device: torch.device
) -> None:
    """Judge all in the same episodes, as `config.eval` and `config.sim` say; write comparison.json and .png.

    Raises:
        SimError: the simulator fails, or a file cannot be written.
    """
    options = config.eval
    protocol = {"episodes": options.episodes, "seed": options.seed, "delay_steps": options.delay_steps}
    observed = next(iter(contenders.values())).spec.observation_steps
    with closing(make_environments(task, config.sim, options.episodes, observed, device)) as env:
        results = {
            name: summary(judge(policy, env, f"judging {name}", **protocol)) for name, policy in contenders.items()
        }
    policies = {name: {key: result[key] for key in KEPT} for name, result in results.items()}
    versions = next(iter(results.values()))["versions"]
    content = {"task": task.spec.name, **protocol, "policies": policies, "versions": versions}
    write_json(folder / COMPARISON, content)
    _plot(policies, folder / "comparison.png")
    _print(policies, content)


def _plot(policies: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Mean and 95 % interval of each policy."""
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(policies)), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
        axes.set_xlabel(f"{quantity}, 95 % interval")
        axes.grid(alpha=0.3)
        for row, result in enumerate(policies.values()):
            low, mean, high = (result[quantity][key] for key in ("low", "mean", "high"))
            if None not in (low, mean, high):
                axes.plot([low, high], [row, row], color="tab:blue")
                axes.plot([mean], [row], "o", color="tab:blue")
        if quantity == "success":
            axes.set_xlim(-0.02, 1.02)
        axes.set_yticks(range(len(policies)), labels=list(policies))
        axes.set_ylim(len(policies) - 0.5, -0.5)
    save_figure(figure, file)


def _print(policies: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> None:
    table = Table(title=f"{content['task']}: {content['episodes']} episodes from seed {content['seed']}")
    for column in ("", *SHOWN, "decision"):
        table.add_column(column, no_wrap=not column)
    for name, result in policies.items():
        success, largest = (_interval(result[quantity]) for quantity in ("success", "max_reward"))
        decision = f"{_number(result['decision_ms']['p50'])} ms"
        table.add_row(name, success, largest, _number(result["return"]["mean"]), decision)
    Console().print(table)


def _interval(interval: Mapping[str, float | None]) -> str:
    return f"{_number(interval['mean'])} [{_number(interval['low'])}, {_number(interval['high'])}]"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"
