"""Which errors a user is meant to read, and how: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """A command line that cannot be run; the message is one line naming the option and the remedy."""


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is told in one line; None for one that deserves its traceback."""
    if os.environ.get("FLOWSTEER_DEBUG") == "1":
        return None
    if isinstance(error, UsageError):
        return 2
    return 1 if isinstance(error, _user_errors()) else None


def _user_errors() -> tuple[type[Exception], ...]:
    # Imported when something has gone wrong, since importing a room takes longer than `flowsteer --help` may.
    from flowsteer.datasets.errors import DataError
    from flowsteer.policies.errors import PolicyError
    from flowsteer.rl_finetune.errors import FinetuneError
    from flowsteer.sim.errors import SimError

    return DataError, PolicyError, SimError, FinetuneError, OSError


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
