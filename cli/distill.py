"""`flowsteer distill`: teach a policy to take one to four steps, or go on with a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowsteer.cli.application import Application, timestamp
from flowsteer.cli.distilling import distill_policy
from flowsteer.cli.learning import Learning, run_or_resume
from flowsteer.cli.refusals import Composed
from flowsteer.configs.distill import DistillConfig, register

PATHS = ("checkpoint", "dataset")
"""Options that name files."""
FREE = ("checkpoint", "data.in_memory")
"""Files may have moved; that the teacher is the same one is checked by its content."""


def default_out(composed: Composed) -> Path:
    """runs/distilled-TIME."""
    return Path("runs", f"distilled-{timestamp()}")


learning = Learning("distill", distill_policy)
application = Application(
    "distill",
    "Teach a policy to take one to four steps, or go on with a run.",
    DistillConfig,
    learning,
    default_out,
    paths=PATHS,
    register=register,
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return run_or_resume(application, learning, args, FREE)
