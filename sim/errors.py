"""The one exception of this room that a user is meant to see, and the way it is raised for missing packages."""

from __future__ import annotations

import importlib
import os
from typing import Any


class SimError(RuntimeError):
    """Bad input to a simulation; the message is one line naming the task or key and the remedy."""


class EpisodeLostError(SimError):
    """This episode cannot go on and counts for nothing; the environment can start another."""


def check_episodes(episodes: int, seed: int) -> None:
    """Refuse to run no episodes, or from a negative seed, which no generator takes.

    Raises:
        SimError: naming the number.
    """
    if episodes < 1:
        raise SimError(f"episodes must be at least 1, got {episodes}")
    if seed < 0:
        raise SimError(f"seed must not be negative, got {seed}")


def optional_module(name: str, extra: str) -> Any:
    """Import the module `name`, which `pip install 'flowsteer[extra]'` brings.

    Raises:
        SimError: if it is not installed, or cannot be imported here.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SimError(f"this needs the package of '{error.name}': pip install 'flowsteer[{extra}]'") from error
    except Exception as error:  # MuJoCo loads the graphics library that MUJOCO_GL names, and fails in its way
        library = os.environ.get("MUJOCO_GL")
        remedy = f"; MUJOCO_GL={library} is set: unset it, or install that library" if library else ""
        raise SimError(f"'{name}' cannot be imported ({type(error).__name__}: {error}){remedy}") from error
