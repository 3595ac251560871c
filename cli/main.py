"""The `flowsteer` command. A new subcommand is one module with `main(args) -> int` and one line in COMMANDS."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from flowsteer.cli.dispatch import Command, dispatch
from flowsteer.cli.errors import exit_code, report

COMMANDS = {
    "train": Command("flowsteer.cli.train:main", "clone a policy from demonstrations, or resume a run"),
    "finetune": Command("flowsteer.cli.finetune:main", "improve a policy by reinforcement learning, or resume a run"),
    "distill": Command("flowsteer.cli.distill:main", "teach a policy to take one to four steps, or resume a run"),
    "rti": Command("flowsteer.cli.rti:main", "choose where chunks may start from the ones before"),
    "eval": Command("flowsteer.cli.eval:main", "judge a checkpoint in simulation"),
    "export": Command("flowsteer.cli.export:main", "write a checkpoint as one ONNX file"),
    "data": Command("flowsteer.cli.data:main", "inspect, convert, collect and fetch demonstrations"),
    "demo": Command("flowsteer.cli.demo:main", "collect, train and judge a robot arm in minutes"),
    "bench": Command("flowsteer.cli.bench:main", "measure how fast things are"),
}
SUMMARY = "flowsteer: robot policies that sample actions from a generative model"
INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (of this process by default) and return its exit code.

    0 done, 1 it failed (one line says why), 2 the command line cannot be run, 130 stopped by a signal.
    FLOWSTEER_DEBUG=1 shows the traceback of every error.
    """
    if args is None:
        warnings.formatwarning = _one_line
        args = sys.argv[1:]
    try:
        return dispatch("flowsteer", SUMMARY, COMMANDS, args)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        report(error)
        return code


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning for people: without the place in the code."""
    return f"warning: {message}\n"


if __name__ == "__main__":
    sys.exit(main())
