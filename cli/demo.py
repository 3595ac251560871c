"""`flowsteer demo`: a scripted expert shows, a flow policy learns, unseen episodes judge. Three commands in one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from flowsteer.cli import collect, eval, train
from flowsteer.cli.application import Application
from flowsteer.cli.bench import machine, made_by
from flowsteer.cli.checks import check_not_negative, check_positive, check_seeds
from flowsteer.cli.files import write_json
from flowsteer.configs.demo import DemoConfig
from flowsteer.datasets.progress import format_duration
from flowsteer.sim.results import EVAL_JSON

TASK = "lift"
UNSEEN_SEED = 10_000
"""Of the first judged episode; demonstrations count up from 0."""

DEMO_JSON = "demo.json"
JUDGED = ("success", "max_reward", "episodes", "lost", "env_steps", "decision_ms", "versions")
"""What demo.json repeats of eval.json."""

console = Console(soft_wrap=True, highlight=False)


def run(config: DictConfig, folder: Path) -> float:
    """Collect, train and judge below `folder`, going on where an earlier call ended; returns the success.

    `demo.json` in it then holds how it went, to be copied beside other results.
    """
    check_positive(config, "demonstrations", "steps", "episodes")
    check_not_negative(config, "videos")
    check_seeds(config, "seed")
    # Products this small gain little from a second thread, and lose a lot where other programs want the core.
    torch.set_num_threads(1)
    dataset, trained, judged = folder / "demonstrations" / f"{TASK}.zarr", folder / "policy", folder / "judged"
    wall_s: dict[str, float] = {}
    continued = dataset.exists() or trained.exists()
    with _stage(f"1/3  a scripted expert lifts the cube {config.demonstrations} times", "collect", wall_s):
        if not dataset.exists():
            collect.collect_demonstrations(_collecting(config), dataset.parent)
    with _stage(f"2/3  a flow policy learns from it for {config.steps} steps", "train", wall_s):
        train.learning.go_on(_training(config, dataset), trained)
    with _stage(f"3/3  {config.episodes} unseen episodes judge it", "judge", wall_s):
        success = eval.run(_judging(config, trained), judged)
    write_json(folder / DEMO_JSON, {**_summary(config, judged / EVAL_JSON), "continued": continued, "wall_s": wall_s})
    films = sorted(judged.glob("*.mp4")) or sorted(judged.glob("*seed*.png"))
    console.print("\n[bold]Look at[/bold]")
    for path in (*films, judged / "episodes.png", trained / "loss.png", folder / DEMO_JSON):
        if path.exists():
            console.print(f"  {path}")
    return success


def _collecting(config: DictConfig) -> DictConfig:
    # Pushes and pauses show how to recover; what is recorded is what the expert wanted (DART, Laskey et al. 2017).
    noise = ("noise.std=0.15", "noise.correlation=0.5", "noise.pause_probability=0.02")
    return collect.main.compose(f"task={TASK}", f"episodes={config.demonstrations}", f"seed={config.seed}", *noise)


def _training(config: DictConfig, dataset: Path) -> DictConfig:
    composed = train.application.compose(
        f"task={TASK}",
        "policy=flow",
        "device=cpu",
        f"seed={config.seed}",
        f"train.steps={config.steps}",
        "train.batch_size=128",
        "train.warmup_steps=200",
        "train.evaluate_every=0",
        "policy.network.hidden=256",
        "policy.network.blocks=3",
    )
    composed.dataset = str(dataset)
    return composed


def _judging(config: DictConfig, checkpoint: Path) -> DictConfig:
    composed = eval.main.compose(f"episodes={config.episodes}", f"seed={UNSEEN_SEED}", f"eval.videos={config.videos}")
    composed.checkpoint = str(checkpoint)
    return composed


def _summary(config: DictConfig, file: Path) -> dict[str, Any]:
    """What was asked for, and what the judging in `file` came to."""
    judged = json.loads(file.read_text())
    asked = {name: config[name] for name in ("demonstrations", "steps", "seed")}
    return {
        "command": made_by("demo"),
        "task": TASK,
        **asked,
        "first_judged_seed": UNSEEN_SEED,
        **{name: judged[name] for name in JUDGED},
        "failed_seeds": [row["seed"] for row in judged["rows"] if not row["success"]],
        "machine": machine(),
    }


@contextmanager
def _stage(title: str, name: str, wall_s: dict[str, float]) -> Iterator[None]:
    """Say what goes on; the time it takes is written to `wall_s`."""
    console.print(f"\n[bold]{title}[/bold]")
    started = time.monotonic()
    yield
    wall_s[name] = round(time.monotonic() - started, 1)
    console.print(f"[dim]took {format_duration(wall_s[name])}[/dim]")


main = Application(
    "demo",
    "Watch a robot arm learn to lift a cube, in minutes.",
    DemoConfig,
    run,
    lambda composed: Path("runs/demo"),
)
