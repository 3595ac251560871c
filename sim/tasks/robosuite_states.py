"""What robosuite's tasks observe in recorded simulator states, for demonstrations that keep nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing

import numpy as np

from flowsteer.sim.tasks.base import Array, Arrays
from flowsteer.sim.tasks.robosuite import RobosuiteTask


def observations_from_states(
    task: RobosuiteTask, states: Array, track: Callable[[Iterable[Array]], Iterable[Array]] = iter
) -> Arrays:
    """What a robosuite task observes in recorded MuJoCo states [N, 1 + nq + nv], as {key: [N, ...]}.

    For demonstrations that keep states and no observations, such as robosuite's own `demo.hdf5`, of 1.4 too: the
    worlds have the same joints. The cube's size, which is not in the state, plays no part in what is observed
    without cameras.

    Args:
        task: where the states were recorded.
        states: at least one.
        track: wraps the states as they are gone through, to show how far that is.

    Raises:
        SimError: the states are of another world.
    """
    with closing(task.make()) as env:
        env.reset(0)
        seen = [env.set_state(state) for state in track(states)]
    return {key: np.stack([observation[key] for observation in seen]) for key in task.spec.observations}
