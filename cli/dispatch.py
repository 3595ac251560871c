"""Commands by name, imported only when they are run, so that `flowsteer --help` is instant."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, final

from flowsteer.cli.errors import UsageError, unknown

HELP = ("-h", "--help")


@final
class Parser(argparse.ArgumentParser):
    """Tells a command line that it cannot parse as every other one that cannot be run."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with a pointer to the help."""
        raise UsageError(f"{message}; see {self.prog} --help")


@final
@dataclass(frozen=True)
class Command:
    """A subcommand: `target` is "module:function" of a function(args: list[str]) -> exit code."""

    target: str
    summary: str

    def run(self, args: Sequence[str]) -> int:
        """Import the module and call the function."""
        module, _, function = self.target.partition(":")
        code: int = getattr(importlib.import_module(module), function)(list(args))
        return code


def dispatch(program: str, summary: str, commands: Mapping[str, Command], args: Sequence[str]) -> int:
    """Run the command that the first argument names, with the others.

    Raises:
        UsageError: no such command; names the nearest.
    """
    if not args:
        raise UsageError(f"{program} needs a command: {', '.join(commands)}; see {program} --help")
    if args[0] in HELP:
        print(overview(program, summary, commands))
        return 0
    if args[0] not in commands:
        raise unknown("command", args[0], commands)
    return commands[args[0]].run(args[1:])


def overview(program: str, summary: str, commands: Mapping[str, Command]) -> str:
    """The text of `--help`."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in commands.items()]
    usage = f"usage: {program} COMMAND ...      ({program} COMMAND --help lists the options of one)"
    return "\n".join([summary, "", usage, "", *lines])
