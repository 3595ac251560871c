"""`flowsteer distill`: teach a policy to take one to four steps, or go on with a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from flowsteer.cli.application import Application, timestamp
from flowsteer.cli.distilling import distill_policy
from flowsteer.cli.errors import UsageError
from flowsteer.cli.refusals import Composed
from flowsteer.cli.resume import resumed_config, resumed_run
from flowsteer.cli.training import CONFIG, is_main_process
from flowsteer.configs.distill import DistillConfig, register

PATHS = ("checkpoint", "dataset")
"""Options that name files."""
FREE = ("checkpoint", "data.in_memory")
"""Files may have moved; that the teacher is the same one is checked by its content."""


def run(config: DictConfig, folder: Path) -> float:
    """`distill` in a `folder` that must not hold a run yet."""
    if (folder / CONFIG).exists() and is_main_process():
        raise UsageError(f"{folder} already holds a run: continue it with resume={folder} or choose another out=")
    return distill(config, folder)


def distill(config: DictConfig, folder: Path) -> float:
    """Distill in `folder`, going on where a run in it ended; returns the best evaluation's score.

    Raises:
        KeyboardInterrupt: a signal stopped it cleanly.
    """
    outcome = distill_policy(config, folder)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.step}; go on with: flowsteer distill resume={folder}")
    if is_main_process():
        print(f"{folder}: {outcome.step} steps done; judge it with: flowsteer eval checkpoint={folder}")
    return outcome.best_score


def default_out(composed: Composed) -> Path:
    """runs/distilled-TIME."""
    return Path("runs", f"distilled-{timestamp()}")


application = Application(
    "distill",
    "Teach a policy to take one to four steps, or go on with a run.",
    DistillConfig,
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
    distill(resumed_config(DistillConfig, PATHS, folder, args, FREE), folder)
    return 0
