"""`flowsteer finetune`: improve a policy by reinforcement learning, or go on with a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowsteer.cli.application import Application, timestamp
from flowsteer.cli.finetuning import finetune_policy
from flowsteer.cli.learning import Learning, run_or_resume
from flowsteer.cli.refusals import Composed
from flowsteer.configs.finetune import FinetuneConfig, register

PATHS = ("checkpoint",)
"""Options that name files."""


def default_out(composed: Composed) -> Path:
    """runs/ALGO-TIME."""
    return Path("runs", f"{composed.chosen['algo']}-{timestamp()}")


learning = Learning(
    "finetune", finetune_policy, done="{} env steps", stopped="after {} env steps", length="train.env_steps"
)
application = Application(
    "finetune",
    "Improve a policy by reinforcement learning, or go on with a run.",
    FinetuneConfig,
    learning,
    default_out,
    paths=PATHS,
    register=register,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return run_or_resume(application, learning, args)
