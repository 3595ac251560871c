"""Observations for demonstrations that hold only simulator states, such as robosuite's raw `demo.hdf5`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from flowsteer.cli.errors import UsageError
from flowsteer.datasets.progress import ProgressBar
from flowsteer.datasets.replay_buffer import ACTION, ReplayBuffer
from flowsteer.sim.tasks.base import Array
from flowsteer.sim.tasks.robosuite import ROBOSUITE_TASKS, task_from_env_args
from flowsteer.sim.tasks.robosuite_states import observations_from_states

ENV_ARGS, STATES = "env_args", "states"


def observe(buffer: ReplayBuffer) -> ReplayBuffer:
    """`buffer` with what its robosuite task observes without cameras in each of its states.

    Raises:
        UsageError: it holds no states, does not tell its environment, or has such observations already.
        SimError: the environment is unknown, the states are not its, or robosuite is not installed.
    """
    for name, there in ((STATES, buffer.data), (ENV_ARGS, buffer.meta)):
        if name not in there:
            raise UsageError(
                f"{buffer.source} holds no {name}, which --observe needs: leave it out, or give robosuite's demo.hdf5"
            )
    env_args = _without_cameras(buffer.meta[ENV_ARGS])
    task = task_from_env_args(env_args)
    known = [key for key in task.spec.observations if key in buffer.data]
    if known:
        raise UsageError(f"{buffer.source} holds observations already, such as '{known[0]}': leave out --observe")
    seen = observations_from_states(task, np.asarray(buffer.array(STATES)), _with_bar)
    return replace(buffer, data={**seen, **buffer.data}, meta={**buffer.meta, ENV_ARGS: env_args})


def _without_cameras(env_args: dict[str, Any]) -> dict[str, Any]:
    """As a task is told that its policies see the object's pose and no pictures."""
    return {**env_args, "env_kwargs": {**env_args.get("env_kwargs", {}), "use_camera_obs": False}}


def _with_bar(states: Iterable[Array]) -> Iterator[Array]:
    frames = list(states)
    with ProgressBar("observing", len(frames), "states") as bar:
        for frame in frames:
            yield frame
            bar.advance()


def hint(buffer: ReplayBuffer) -> ReplayBuffer:
    """`buffer` as it is; says how to get observations where there are only states of a world that is known."""
    known = buffer.meta.get(ENV_ARGS, {}).get("env_name") in ROBOSUITE_TASKS
    if known and {STATES, ACTION} <= buffer.data.keys() <= {STATES, ACTION, "reward", "done"}:
        print(f"{buffer.source} holds simulator states and no observations: --observe adds what robosuite sees in them")
    return buffer
