"""`flowsteer bench finetune`: one table and one plot of several fine-tuned runs, beside what they started from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from omegaconf import DictConfig

from flowsteer.cli.bench import benchmark
from flowsteer.cli.errors import UsageError, unknown
from flowsteer.cli.finetuning import CLONED
from flowsteer.cli.judged_runs import (
    SCORES,
    Run,
    by_step,
    check_runs,
    earlier_results,
    grouped,
    judged,
    plot_curves,
    spread,
    target_name,
)
from flowsteer.policies.checkpoint import read_config

ALIKE = ("task", "algo", "policy", "start")
"""Runs that differ in none of them must differ in their seed alone."""
ASIDE = ("seed", "out", "resume", "device", "checkpoint", "task", "eval", "log")
"""Options, and groups of them, that say nothing of how a run learns, or that `ALIKE` knows."""


@final
@dataclass
class FinetuneBenchmark:
    """What to gather.

    Attributes:
        runs: run folders of `flowsteer finetune`.
        earlier: results of this benchmark, NAME.json each, whose runs join: they stay when their folders are gone.
        judged: the folder of the evaluation within each run, and within the runs that they started from.
        score: "success", "max_reward" or "return".
        name: of the files to write.
        out: where to write them.
    """

    runs: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    judged: str = "eval-100x10000"
    score: str = "success"
    name: str = "finetune"
    out: str | None = None


def gather(config: DictConfig) -> dict[str, Any]:
    """`rows`: an algorithm on a policy each, over the seeds; `runs`: a run each, with its curve."""
    if config.score not in SCORES:
        raise unknown("score", config.score, SCORES)
    folders, earlier = config.runs if config.earlier else check_runs(config.runs), earlier_results(config.earlier)
    known = [run for result in earlier for run in result.pop("runs")]
    runs = [*known, *(_run(Path(folder), config.judged) for folder in folders)]
    groups = grouped(runs, *ALIKE)
    for group in groups:
        _check_alike(group)
    return {"rows": [_row(g, config.score) for g in groups], "score": config.score, "runs": runs, "earlier": earlier}


def _run(folder: Path, evaluation: str) -> Run:
    """What a run was, how it was judged, and how what it started from was."""
    stored = read_config(folder)
    if CLONED not in stored:
        raise UsageError(f"{folder} is not a run of flowsteer finetune: gather it with flowsteer bench cloning")
    config, after, metrics = stored["finetune"], judged(folder, evaluation), by_step(folder)
    start = config["checkpoint"]
    before = None if start is None else judged(Path(start), evaluation)
    spent = [row["time/collect_s"] + row["time/update_s"] for row in metrics if "time/collect_s" in row]
    return {
        "task": after["task"],
        "algo": target_name(config["algo"]),
        "policy": target_name(stored[CLONED]),
        "start": start and Path(start).name,
        "seed": config["seed"],
        "env_steps": metrics[-1]["step"],
        "minutes": sum(spent) / 60,
        "episodes": after["episodes"],
        "before": before and {name: before[name] for name in SCORES},
        "after": {name: after[name] for name in SCORES},
        "curve": [_point(row) for row in metrics if "eval/success" in row],
        "options": dict(_options({name: value for name, value in config.items() if name not in ASIDE})),
    }


def _options(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """How a run learns: each option by its full name, and its value."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield f"{prefix}{name}", value


def _check_alike(runs: list[Run]) -> None:
    """Refuse to call runs the seeds of one experiment where they are not.

    Raises:
        UsageError: a seed is there twice, or naming the first option that differs.
    """
    for first, run in itertools.combinations(runs, 2):
        seeds = f"seeds {first['seed']} and {run['seed']} of {_label(run)}"
        if first["seed"] == run["seed"]:
            raise UsageError(f"{seeds} are one seed: gather the runs apart, with another name=")
        one, other = _traits(first), _traits(run)
        # Runs that were recorded before their options were say less.
        for name in sorted(one.keys() & other.keys()):
            if one[name] != other[name]:
                raise UsageError(
                    f"{seeds} differ in {name} ({one[name]} and {other[name]}): "
                    "gather the runs apart, with another name="
                )


def _traits(run: Run) -> dict[str, Any]:
    """What seeds of one experiment share; a run ends within an iteration of its number of env steps."""
    return {
        **run.get("options", {}),
        "episodes": run["episodes"],
        "million env steps": round(run["env_steps"] / 1e6, 1),
    }


def _point(row: Mapping[str, float]) -> dict[str, float]:
    """An evaluation during the run."""
    return {"env_steps": row["step"], **{name: row[f"eval/{name}"] for name in SCORES}}


def _row(runs: list[Run], score: str) -> dict[str, Any]:
    """Runs that differ in their seed."""
    first, before = runs[0], runs[0]["before"]
    return {
        **{name: first[name] for name in ("task", "algo", "policy")},
        "seeds": len(runs),
        "env_steps": float(np.mean([run["env_steps"] for run in runs])),
        "minutes": float(np.mean([run["minutes"] for run in runs])),
        "before": before and before[score]["mean"],
        score: spread([run["after"][score]["mean"] for run in runs]),
    }


def plot(result: Mapping[str, Any], file: Path) -> None:
    """The evaluations during the runs, against env steps."""
    groups = {_label(runs[0]): runs for runs in grouped(result["runs"], *ALIKE)}
    plot_curves(groups, "env_steps", [result["score"]], "env steps", file)


def _label(run: Run) -> str:
    start = "" if run["start"] is None else f" from {run['start']}"
    return f"{run['task']}: {run['algo']}, {run['policy']}{start}"


main = benchmark(
    "finetune",
    "Gather judged runs of flowsteer finetune into one table and one plot.",
    FinetuneBenchmark,
    gather,
    plot,
)
