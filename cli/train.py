"""`flowsteer train`: clone a policy from demonstrations, or go on with a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from flowsteer.cli.application import Application, timestamp
from flowsteer.cli.errors import UsageError
from flowsteer.cli.refusals import Composed
from flowsteer.cli.resume import resumed_config, resumed_run
from flowsteer.cli.training import CONFIG, is_main_process, train_policy
from flowsteer.configs.groups import register
from flowsteer.configs.train import TrainConfig

PATHS = ("dataset",)
"""Options that name files."""
SAMPLING = ("steps", "eta", "solver", "clip", "max_steps", "stop", "tolerance")
FREE = (*(f"policy.{name}" for name in SAMPLING), "data.in_memory")
"""Options of the policy and its data that leave the meaning of the weights alone."""


def run(config: DictConfig, folder: Path) -> float:
    """`train` in a `folder` that must not hold a run yet."""
    if (folder / CONFIG).exists() and is_main_process():
        raise UsageError(f"{folder} already holds a run: continue it with resume={folder} or choose another out=")
    return train(config, folder)


def train(config: DictConfig, folder: Path) -> float:
    """Train in `folder`, going on where a run in it ended; returns the best evaluation's score.

    Raises:
        KeyboardInterrupt: a signal stopped it cleanly.
    """
    outcome = train_policy(config, folder)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.step}; go on with: flowsteer train resume={folder}")
    if is_main_process():
        print(f"{folder}: {outcome.step} steps done; judge it with: flowsteer eval checkpoint={folder}")
    return outcome.best_score


def default_out(composed: Composed) -> Path:
    """runs/TASK-POLICY-TIME."""
    return Path("runs", f"{composed.chosen['task']}-{composed.chosen['policy']}-{timestamp()}")


application = Application(
    "train",
    "Clone a policy from demonstrations, or go on with a run.",
    TrainConfig,
    run,
    default_out,
    paths=PATHS,
    register=register,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    folder = resumed_run(args)
    if folder is None:
        return application(args)
    train(resumed_config(TrainConfig, PATHS, folder, args, FREE), folder)
    return 0
