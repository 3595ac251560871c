"""What a task promises about its inputs and outputs. Imported by worker processes: nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from flowsteer.policies.spec import ArraySpec


@final
@dataclass(frozen=True)
class TaskSpec:
    """What a task offers: the arrays of one step, the action width, its rate and its episode limit (env steps).

    Actions are in the task's physical units, within `action_low` and `action_high` (each Da long). `zero_holds` says
    that an action of 0 keeps the robot where it is, as with displacements and velocities; where actions are targets,
    repeating one does. `discrete` names action dimensions that take one of two values, such as a gripper's.
    """

    name: str
    observations: Mapping[str, ArraySpec]
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    control_hz: float
    max_episode_steps: int
    zero_holds: bool = False
    discrete: tuple[int, ...] = ()
