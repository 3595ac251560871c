"""`flowsteer bench cloning`: one table and one plot of several runs that `flowsteer eval` has judged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.errors import UsageError
from flowsteer.cli.run_log import METRICS, read_metrics
from flowsteer.policies.checkpoint import read_config
from flowsteer.sim.files import replacing
from flowsteer.sim.results import EVAL_JSON

SCORES = ("max_reward", "success", "return")


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
    if not config.runs:
        raise UsageError("runs= is missing: name run folders, 'runs=[runs/a,runs/b]'")
    runs = [_run(Path(name), config.judged) for name in config.runs]
    return {"rows": summarise(runs), "runs": runs}


def _run(folder: Path, judged: str) -> dict[str, Any]:
    """What a run was and how its last averaged weights were judged."""
    file = folder / judged / EVAL_JSON
    if not file.is_file():
        raise UsageError(f"{file} is missing: make it with flowsteer eval checkpoint={folder}")
    config, result = read_config(folder), json.loads(file.read_text())
    target = config["policy"]["_target_"].rsplit(".", 1)[-1]
    scores = {name: result[name] for name in SCORES}
    return {
        "task": result["task"],
        "policy": target,
        "seed": config["seed"],
        "steps": config["train"]["steps"],
        "train_minutes": _train_s(folder) / 60,
        "episodes": result["episodes"],
        **scores,
        "decision_ms": result["decision_ms"],
        "curve": _curve(folder),
    }


def _train_s(folder: Path) -> float:
    return max((row["train/train_s"] for row in read_metrics(folder / METRICS) if "train/train_s" in row), default=0.0)


def _curve(folder: Path) -> list[dict[str, float]]:
    """Every evaluation during training: step, minutes of training until then, scores."""
    merged: dict[int, dict[str, float]] = {}
    for row in read_metrics(folder / METRICS):
        merged.setdefault(row["step"], {}).update(row)
    return [
        {
            "step": step,
            "train_minutes": row["train/train_s"] / 60,
            **{name: row[f"eval/{name}"] for name in SCORES},
        }
        for step, row in sorted(merged.items())
        if "eval/success" in row and "train/train_s" in row
    ]


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy: the mean over its training seeds, and the lowest and highest seed."""
    return [
        {
            "policy": policy,
            "seeds": len(chosen),
            "minutes": float(np.mean([run["train_minutes"] for run in chosen])),
            **{score: _spread(chosen, score) for score in SCORES[:2]},
        }
        for policy, chosen in _grouped(runs)
    ]


def _spread(runs: Iterable[dict[str, Any]], score: str) -> dict[str, float]:
    means = np.array([run[score]["mean"] for run in runs])
    return {"mean": float(means.mean()), "lowest": float(means.min()), "highest": float(means.max())}


def _grouped(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(run["policy"] for run in runs)
    return [(name, [run for run in runs if run["policy"] == name]) for name in names]


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Success and maximum reward of the evaluations during training, against minutes of training."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), SCORES[:2], strict=True):
        for number, (policy, chosen) in enumerate(_grouped(result["runs"])):
            for run in chosen:
                minutes = [point["train_minutes"] for point in run["curve"]]
                values = [point[score] for point in run["curve"]]
                label = policy if run is chosen[0] else None
                axes.plot(minutes, values, marker="o", markersize=3, color=f"C{number}", label=label)
        axes.set(xlabel="minutes of training", ylabel=score.replace("_", " "), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110)


main = benchmark(
    "cloning", "Gather judged runs into one table and one plot against training time.", CloningBenchmark, gather, plot
)
