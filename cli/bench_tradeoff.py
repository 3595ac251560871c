"""`flowsteer bench tradeoff`: what policies score by the network evaluations that a decision costs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, final

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.errors import UsageError
from flowsteer.cli.judged_runs import PLOTTED, Run, check_runs, grouped, judged, spread, target_name
from flowsteer.policies.checkpoint import read_config
from flowsteer.sim.plots import save_figure
from flowsteer.sim.results import EVAL_JSON

ALIKE = ("task", "policy", "steps", "evaluation", "execution", "execution_steps")
"""Evaluations that differ in none of them differ in the seed of training, and in what was chosen for each."""
MARKERS = "osD^v<>P"


@final
@dataclass
class TradeoffBenchmark:
    """What to gather.

    Attributes:
        runs: run folders.
        judged: folders of evaluations within the runs; a run may lack some.
        name: of the files to write.
        out: where to write them.
    """

    runs: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=lambda: ["eval-100x10000"])
    name: str = "tradeoff"
    out: str | None = None


def gather(config: DictConfig) -> dict[str, Any]:
    """`rows`: a policy under one execution each, over its training seeds; `runs`: an evaluation each."""
    runs = [row for folder in check_runs(config.runs) for row in _evaluations(folder, config.judged)]
    return {"rows": [_row(group) for group in grouped(runs, *ALIKE)], "runs": runs}


def _evaluations(folder: Path, names: list[str]) -> list[Run]:
    """All of `names` that the run has.

    Raises:
        UsageError: it has none.
    """
    found = [name for name in names if (folder / name / EVAL_JSON).is_file()]
    if not found:
        raise UsageError(f"{folder} holds none of {', '.join(names)}: make one with flowsteer eval checkpoint={folder}")
    stored = read_config(folder)
    return [_evaluation(folder, name, stored) for name in found]


def _evaluation(folder: Path, name: str, stored: Mapping[str, Any]) -> Run:
    policy, result = stored["policy"], judged(folder, name)
    if result["network_evaluations"] is None:
        raise UsageError(f"{folder} holds {target_name(policy)}, which runs no network K times: leave it out of runs=")
    return {
        "task": result["task"],
        "evaluation": name,
        "policy": _family(policy),
        "steps": policy.get("steps"),
        # A student's "seed" is the one that its demonstrations were split by.
        "seed": stored.get("distill", stored)["seed"],
        "execution": result["execution"],
        "execution_options": result["execution_options"],
        "execution_steps": result["execution_steps"],
        "network_evaluations": result["network_evaluations"],
        "episodes": result["episodes"],
        **{score: result[score] for score in PLOTTED},
    }


def _family(policy: Mapping[str, Any]) -> str:
    """Students of diffusion and of flow differ in their path alone."""
    return ", ".join(target_name(part) for part in (policy, policy.get("path")) if part is not None)


def _row(runs: list[Run]) -> dict[str, Any]:
    """A policy under one execution, over its training seeds."""
    first, evaluations = runs[0], float(np.mean([run["network_evaluations"] for run in runs]))
    return {
        "policy": first["policy"],
        "policy_steps": first["steps"],
        **{name: first[name] for name in ("execution", "execution_steps")},
        "seeds": len(runs),
        "network_evaluations": evaluations,
        **{score: spread([run[score]["mean"] for run in runs]) for score in PLOTTED},
    }


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Scores against network evaluations: a colour a policy, a marker an execution, a point a training seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    groups = grouped(result["runs"], *ALIKE)
    colors = {policy: f"C{n}" for n, policy in enumerate(dict.fromkeys(runs[0]["policy"] for runs in groups))}
    markers = dict(zip(dict.fromkeys(_execution(runs[0]) for runs in groups), cycle(MARKERS), strict=False))
    for axes, score in zip(figure.subplots(1, len(PLOTTED)), PLOTTED, strict=True):
        for runs in groups:
            execution = _execution(runs[0])
            x, y = [run["network_evaluations"] for run in runs], [run[score]["mean"] for run in runs]
            label = f"{_name(runs[0])}, {execution}"
            axes.plot(x, y, markers[execution], color=colors[runs[0]["policy"]], alpha=0.7, label=label)
        axes.set(xlabel="network evaluations per decision", ylabel=score.replace("_", " "), xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        if score == "success":
            axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3, which="both")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    save_figure(figure, file, dpi=110)


def _name(run: Run) -> str:
    return run["policy"] if run["steps"] is None else f"{run['policy']}, K = {run['steps']}"


def _execution(run: Run) -> str:
    return f"{run['execution']}, Ta = {run['execution_steps']}"


main = benchmark(
    "tradeoff",
    "Gather evaluations into one table and one plot of score against network evaluations.",
    TradeoffBenchmark,
    gather,
    plot,
)
