"""`flowsteer train`: clone a policy from demonstrations, or go on with a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowsteer.cli.application import Application, timestamp
from flowsteer.cli.learning import Learning, run_or_resume
from flowsteer.cli.refusals import Composed
from flowsteer.cli.training import train_policy
from flowsteer.configs.groups import register
from flowsteer.configs.train import TrainConfig

PATHS = ("dataset",)
"""Options that name files."""
SAMPLING = ("steps", "eta", "solver", "clip", "max_steps", "stop", "tolerance")
FREE = (*(f"policy.{name}" for name in SAMPLING), "data.in_memory")
"""Options of the policy and its data that leave the meaning of the weights alone."""


def default_out(composed: Composed) -> Path:
    """runs/TASK-POLICY-TIME."""
    return Path("runs", f"{composed.chosen['task']}-{composed.chosen['policy']}-{timestamp()}")


learning = Learning("train", train_policy)
application = Application(
    "train",
    "Clone a policy from demonstrations, or go on with a run.",
    TrainConfig,
    learning,
    default_out,
    paths=PATHS,
    register=register,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return run_or_resume(application, learning, args, FREE)
