"""`flowsteer bench cloning`: one table and one plot of several runs that `flowsteer eval` has judged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from flowsteer.cli.application import Application
from flowsteer.cli.bench import machine, print_rows
from flowsteer.cli.errors import UsageError
from flowsteer.cli.files import write_json
from flowsteer.cli.run_log import METRICS, read_metrics
from flowsteer.policies.checkpoint import read_config
from flowsteer.sim.files import replacing
from flowsteer.sim.results import EVAL_JSON, versions

SCORES = ("max_reward", "success", "return")


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


def run(config: DictConfig, folder: Path) -> None:
    """Write NAME.json and NAME.png to `folder` and print the table."""
    if not config.runs:
        raise UsageError("runs= is missing: name run folders, 'runs=[runs/a,runs/b]'")
    rows = [_row(Path(name), config.judged) for name in config.runs]
    curves = [{**_labels(row), "points": _curve(Path(name))} for name, row in zip(config.runs, rows, strict=True)]
    by_policy = summarise(rows)
    result = {"rows": rows, "by_policy": by_policy, "curves": curves, "machine": machine(), "versions": versions()}
    write_json(folder / f"{config.name}.json", result)
    _plot(folder / f"{config.name}.png", curves)
    print_rows(config.name, [_printed(row) for row in by_policy])
    print(f"written to {folder / config.name}.json")


def _row(folder: Path, judged: str) -> dict[str, Any]:
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
    }


def _labels(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("policy", "seed")}


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


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy: the mean over its training seeds, and the lowest and highest seed."""
    return [
        {
            "policy": policy,
            "seeds": len(chosen),
            "train_minutes": float(np.mean([row["train_minutes"] for row in chosen])),
            **{f"{score}{suffix}": value for score in SCORES[:2] for suffix, value in _spread(chosen, score)},
        }
        for policy, chosen in _grouped(rows)
    ]


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    """A row narrow enough for a terminal: means with the lowest and highest seed."""
    scores = {s: f"{row[s]:.3f} ({row[f'{s}_lowest']:.3f} to {row[f'{s}_highest']:.3f})" for s in SCORES[:2]}
    return {"policy": row["policy"], "seeds": row["seeds"], "minutes": row["train_minutes"], **scores}


def _spread(rows: Iterable[dict[str, Any]], score: str) -> list[tuple[str, float]]:
    means = np.array([row[score]["mean"] for row in rows])
    return [("", float(means.mean())), ("_lowest", float(means.min())), ("_highest", float(means.max()))]


def _grouped(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(row["policy"] for row in rows)
    return [(name, [row for row in rows if row["policy"] == name]) for name in names]


def _plot(file: Path, curves: Sequence[dict[str, Any]]) -> None:
    """Success and maximum reward of the evaluations during training, against minutes of training."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), SCORES[:2], strict=True):
        for number, (policy, chosen) in enumerate(_grouped(curves)):
            for curve in chosen:
                minutes = [point["train_minutes"] for point in curve["points"]]
                values = [point[score] for point in curve["points"]]
                label = policy if curve is chosen[0] else None
                axes.plot(minutes, values, marker="o", markersize=3, color=f"C{number}", label=label)
        axes.set(xlabel="minutes of training", ylabel=score.replace("_", " "), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=110)


main = Application(
    "bench_cloning",
    "Gather judged runs into one table and one plot against training time.",
    CloningBenchmark,
    run,
    lambda composed: Path("runs/bench"),
)
