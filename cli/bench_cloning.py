"""`flowsteer bench cloning`: one table and one plot of several runs that `flowsteer eval` has judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.judged_runs import (
    PLOTTED,
    SCORES,
    Run,
    by_step,
    check_runs,
    grouped,
    judged,
    plot_curves,
    spread,
    target_name,
)
from flowsteer.policies.checkpoint import read_config


@final
@dataclass
class CloningBenchmark:
    """What to gather.

    Attributes:
        runs: run folders.
        judged: the folder of the evaluation within each run.
        name: of the files to write.
        out: where to write them.
    """

    runs: list[str] = field(default_factory=list)
    judged: str = "eval-100x10000"
    name: str = "cloning"
    out: str | None = None


def gather(config: DictConfig) -> dict[str, Any]:
    """`rows`: a policy each, over its training seeds; `runs`: a run each, with its curve during training."""
    runs = [_run(folder, config.judged) for folder in check_runs(config.runs)]
    return {"rows": [_row(group) for group in grouped(runs, "policy")], "runs": runs}


def _run(folder: Path, evaluation: str) -> Run:
    """What a run was and how its last averaged weights were judged."""
    result = judged(folder, evaluation)
    config, metrics = read_config(folder), by_step(folder)
    return {
        "task": result["task"],
        "policy": target_name(config["policy"]),
        "seed": config["seed"],
        "steps": config["train"]["steps"],
        "train_minutes": max((row["train/train_s"] for row in metrics if "train/train_s" in row), default=0.0) / 60,
        "episodes": result["episodes"],
        **{name: result[name] for name in SCORES},
        "decision_ms": result["decision_ms"],
        "curve": [_point(row) for row in metrics if "eval/success" in row and "train/train_s" in row],
    }


def _point(row: Mapping[str, float]) -> dict[str, float]:
    """An evaluation during training."""
    scores = {name: row[f"eval/{name}"] for name in SCORES}
    return {"step": row["step"], "train_minutes": row["train/train_s"] / 60, **scores}


def _row(runs: list[Run]) -> dict[str, Any]:
    """A policy, over its training seeds."""
    return {
        "policy": runs[0]["policy"],
        "seeds": len(runs),
        "minutes": float(np.mean([run["train_minutes"] for run in runs])),
        **{score: spread([run[score]["mean"] for run in runs]) for score in PLOTTED},
    }


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Success and maximum reward of the evaluations during training, against minutes of training."""
    groups = {runs[0]["policy"]: runs for runs in grouped(result["runs"], "policy")}
    plot_curves(groups, "train_minutes", PLOTTED, "minutes of training", file)


main = benchmark(
    "cloning", "Gather judged runs into one table and one plot against training time.", CloningBenchmark, gather, plot
)
