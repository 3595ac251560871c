"""What subcommands that learn have in common: a run has a folder of its own, and `resume=` goes on with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from omegaconf import DictConfig

from flowsteer.cli.application import Application
from flowsteer.cli.errors import UsageError
from flowsteer.cli.resume import resumed_config, resumed_run
from flowsteer.cli.training import CONFIG, Outcome, is_main_process


@final
@dataclass(frozen=True)
class Learning:
    """What an `Application` that learns runs; a class, so that launchers can pickle it.

    Attributes:
        command: the subcommand.
        learn: runs, or goes on with the run in the folder.
        done, stopped: how a number of steps is told at the end and after a signal.
        length: the option that says how many there are.
    """

    command: str
    learn: Callable[[DictConfig, Path], Outcome]
    done: str = "{} steps"
    stopped: str = "at step {}"
    length: str = "train.steps"

    def __call__(self, config: DictConfig, folder: Path) -> float:
        """Learn in a `folder` that must not hold a run yet."""
        if (folder / CONFIG).exists() and is_main_process():
            raise UsageError(f"{folder} already holds a run: continue it with resume={folder} or choose another out=")
        return self.go_on(config, folder)

    def go_on(self, config: DictConfig, folder: Path) -> float:
        """Learn in `folder`, going on where a run in it ended; returns the best evaluation's score.

        Raises:
            KeyboardInterrupt: a signal stopped it cleanly.
        """
        outcome = self.learn(config, folder)
        if not outcome.finished:
            stopped = self.stopped.format(outcome.step)
            raise KeyboardInterrupt(f"stopped {stopped}; go on with: flowsteer {self.command} resume={folder}")
        if is_main_process():
            done = f"{self.done.format(outcome.step)} done"
            more = f", nothing was left to learn (more: {self.length}=)" if outcome.step == outcome.start else ""
            print(f"{folder}: {done}{more}; judge it with: flowsteer eval checkpoint={folder}")
        return outcome.best_score


def run_or_resume(
    application: Application, learning: Learning, args: Sequence[str] | None, free: Collection[str] = ()
) -> int:
    """Run a command line and return its exit code; `free` as in `resumed_config`."""
    args = list(sys.argv[1:] if args is None else args)
    folder = resumed_run(args)
    if folder is None:
        return application(args)
    learning.go_on(resumed_config(application, folder, args, free), folder)
    return 0
