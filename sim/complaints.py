"""Why episodes are lost: what MuJoCo complains of, and what users read of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import final

from flowsteer.sim.errors import SimError, optional_module

Tell = Callable[[Iterable[str]], None]
"""Takes the causes of the episodes that a chunk has lost."""

MORE_MEMORY = 'put a larger <size memory="..."/> into its model'
CALM_DOWN = "act more gently, narrow task.randomize or shorten the model's timestep"


@final
class WarnOnce:
    """A `RuntimeWarning` for each cause; numbers in what follows its last colon, the remedy, make no new one."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, causes: Iterable[str]) -> None:
        """See `Tell`."""
        for cause in causes:
            kind = re.sub(r"\d+", "", cause.rpartition(": ")[2])
            if kind not in self._told:
                self._told.add(kind)
                warnings.warn(cause, RuntimeWarning, stacklevel=4)


def causes(task: str, complaints: Iterable[str]) -> list[str]:
    """Why worlds of the task of this name are unsound, by what MuJoCo has said of them."""
    return [_cause(task, complaint) for complaint in complaints] or [diverged(task)]


def diverged(task: str, complaint: str = "") -> str:
    """A world has blown up."""
    why = f" ({complaint.partition(' Time =')[0].rstrip('.')})" if complaint else ""
    return f"{task}: the physics of a world diverged{why}; the episodes that met it are lost: {CALM_DOWN}"


def not_finite(task: str) -> str:
    """The task is wrong, or a simulator that does not say when it has blown up."""
    return f"{task}: a reward or observation was not finite; the episodes that met it are lost: mend the task"


def stopped(task: str, error: Exception) -> SimError:
    """MuJoCo's own error, on one line and with its remedy."""
    told = " ".join(str(error).split())
    return SimError(f"{task}: MuJoCo stopped ({told}): {MORE_MEMORY if 'memory' in told else 'mend its model'}")


def _cause(task: str, complaint: str) -> str:
    if "memory" not in complaint:
        return diverged(task, complaint)
    return f"{task}: the contacts of a world did not fit into memory; the episodes that met it are lost: {MORE_MEMORY}"


@contextmanager
def heard(task: str, complaints: list[str]) -> Iterator[None]:
    """Add MuJoCo's warnings to `complaints`; by itself it prints them and writes a file MUJOCO_LOG.TXT.

    Raises:
        SimError: MuJoCo cannot go on at all.
    """
    mujoco = optional_module("mujoco", "mujoco")
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(complaints.append)
    try:
        yield
    except (ValueError, mujoco.FatalError) as error:
        raise stopped(task, error) from error
    finally:
        mujoco.set_mju_user_warning(before)
