"""The one exception of this room that a user is meant to see, and the way it is raised for missing packages."""

from __future__ import annotations

import importlib
from typing import Any


class SimError(RuntimeError):
    """Bad input to a simulation; the message is one line naming the task or key and the remedy."""


def optional_module(name: str, extra: str) -> Any:
    """Import the module `name`, which `pip install 'flowsteer[extra]'` brings.

    Raises:
        SimError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SimError(f"this needs the package of '{error.name}': pip install 'flowsteer[{extra}]'") from error
