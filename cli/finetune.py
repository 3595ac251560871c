"""`flowsteer finetune`: improve a policy by reinforcement learning, or go on with a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from flowsteer.cli.application import Application, timestamp
from flowsteer.cli.errors import UsageError
from flowsteer.cli.finetuning import finetune_policy
from flowsteer.cli.refusals import Composed
from flowsteer.cli.resume import resumed_config, resumed_run
from flowsteer.cli.training import CONFIG, is_main_process
from flowsteer.configs.finetune import FinetuneConfig, register

PATHS = ("checkpoint",)
"""Options that name files."""


def run(config: DictConfig, folder: Path) -> float:
    """`finetune` in a `folder` that must not hold a run yet."""
    if (folder / CONFIG).exists() and is_main_process():
        raise UsageError(f"{folder} already holds a run: continue it with resume={folder} or choose another out=")
    return finetune(config, folder)


def finetune(config: DictConfig, folder: Path) -> float:
    """Fine-tune in `folder`, going on where a run in it ended; returns the best evaluation's score.

    Raises:
        KeyboardInterrupt: a signal stopped it cleanly.
    """
    outcome = finetune_policy(config, folder)
    if not outcome.finished:
        raise KeyboardInterrupt(
            f"stopped after {outcome.step} env steps; go on with: flowsteer finetune resume={folder}"
        )
    if is_main_process():
        print(f"{folder}: {outcome.step} env steps done; judge it with: flowsteer eval checkpoint={folder}")
    return outcome.best_score


def default_out(composed: Composed) -> Path:
    """runs/ALGO-TIME."""
    return Path("runs", f"{composed.chosen['algo']}-{timestamp()}")


application = Application(
    "finetune",
    "Improve a policy by reinforcement learning, or go on with a run.",
    FinetuneConfig,
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
    finetune(resumed_config(FinetuneConfig, PATHS, folder, args), folder)
    return 0
