"""Which errors a user is meant to read, and how: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches

from flowsteer.datasets.errors import DataError
from flowsteer.policies.errors import PolicyError
from flowsteer.sim.errors import SimError


class UsageError(ValueError):
    """A command line that cannot be run; the message is one line naming the option and the remedy."""


EXIT_CODES: dict[type[Exception], int] = {UsageError: 2, DataError: 1, PolicyError: 1, SimError: 1, OSError: 1}


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is told in one line; None for one that deserves its traceback."""
    if os.environ.get("FLOWSTEER_DEBUG") == "1":
        return None
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), None)


def one_line(error: BaseException) -> str:
    """What to tell the user."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    return " ".join(text.split()) if text else type(error).__name__


def report(error: BaseException, where: str = "") -> None:
    """Print the one line."""
    print(f"error: {where}{one_line(error)}", file=sys.stderr, flush=True)


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice most like `name`."""
    return get_close_matches(name, list(choices), n=1, cutoff=0.0)[0]


def unknown(what: str, name: str, choices: Iterable[str]) -> UsageError:
    """The refusal of a name that is none of `choices`."""
    known = sorted(choices)
    return UsageError(f"{what} '{name}' is unknown; nearest: {nearest(name, known)} (known: {', '.join(known)})")
