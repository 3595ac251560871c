"""Demonstrations as a policy's observations: the one place where data sets, tasks and policies meet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from flowsteer.cli.errors import UsageError
from flowsteer.datasets.errors import DataError
from flowsteer.datasets.opening import open_dataset, open_source
from flowsteer.datasets.replay_buffer import ACTION, Array, ReplayBuffer
from flowsteer.policies.build import build
from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.sim.errors import SimError
from flowsteer.sim.tasks.base import DatasetKey, Task

ENV_ARGS = "env_args"
"""What robomimic stores of the environment, and the argument of the task made from it."""


@final
@dataclass(frozen=True)
class Demonstrations:
    """A buffer that holds the observations of `spec`, under their names and in their shapes, and "action"."""

    buffer: ReplayBuffer
    spec: PolicySpec


def make_task(config: DictConfig) -> Task | None:
    """The task of `config`, None for task=none; what it takes from the data set is written into `config.task`.

    Raises:
        DataError: the data set does not tell its environment, or one that there is not.
    """
    if config.task is None:
        return None
    if OmegaConf.is_missing(config.task, ENV_ARGS):
        return _recorded_task(config)
    task: Task = build(config.task)
    return task


def _recorded_task(config: DictConfig) -> Task:
    _check_dataset(config)
    # A file that was written without them holds empty ones, as robomimic wants some.
    env_args = open_source(config.dataset).meta.get(ENV_ARGS)
    if not env_args:
        raise DataError(f"{config.dataset} does not hold {ENV_ARGS}: choose its task by name")
    config.task[ENV_ARGS] = env_args
    try:
        task: Task = build(config.task)
    except SimError as error:
        raise DataError(f"{config.dataset}: {error}; correct it or choose a task by name") from error
    return task


def _check_dataset(config: DictConfig) -> None:
    if config.dataset is None:
        raise DataError("dataset= is missing: name a zarr store, an HDF5 file, a LeRobot folder or minari:ID")


def load_demonstrations(config: DictConfig, task: Task | None) -> Demonstrations:
    """Read `config.dataset` as observations of `task`, or without a task as `config.data` says.

    Raises:
        DataError: naming the data set, the key and the remedy.
        UsageError: an option does nothing beside the task.
    """
    _check_dataset(config)
    if task is not None:
        _check_unset(config, task)
    keys = _keys(config, task)
    wanted = {stored.key for stored in keys.values()} | {ACTION}
    buffer = open_dataset(config.dataset, keys=sorted(wanted), in_memory=config.data.in_memory)
    arrays = {key: _read(buffer, stored) for key, stored in keys.items()}
    spec = _spec(config, task, buffer, arrays)
    shaped = {key: _shaped(arrays[key], key, array, buffer.source) for key, array in spec.observations.items()}
    data = {**shaped, ACTION: buffer.array(ACTION)}
    return Demonstrations(ReplayBuffer(data, buffer.episode_ends, buffer.meta, check_finite=False), spec)


def with_mirror_images(demonstrations: Demonstrations, task: Task | None) -> Demonstrations:
    """2E episodes: the E that are there, then the mirror image of each.

    Raises:
        DataError: the task knows none, or the frames are not in memory.
    """
    if task is None or task.mirror is None:
        raise DataError(f"data.mirror=true: task '{_name(task)}' knows no mirror image of its observations")
    arrays = _in_memory(demonstrations, "data.mirror=true turns all frames over")
    images, ends = task.mirror(arrays), demonstrations.buffer.episode_ends
    data = {key: np.concatenate([array, images[key]]) for key, array in arrays.items()}
    return _replaced(demonstrations, data, np.concatenate([ends, ends + demonstrations.buffer.num_frames]))


def in_hindsight(demonstrations: Demonstrations, task: Task | None) -> Demonstrations:
    """The same E episodes, of a goal that lies where each of them ended.

    Raises:
        DataError: the task's goal cannot be moved, or the frames are not in memory.
    """
    if task is None or task.hindsight is None:
        raise DataError(f"data.hindsight=true: task '{_name(task)}' cannot move its goal in what it observes")
    arrays = _in_memory(demonstrations, "data.hindsight=true moves all frames")
    ends = demonstrations.buffer.episode_ends
    return _replaced(demonstrations, task.hindsight(arrays, ends), ends)


def _in_memory(demonstrations: Demonstrations, does: str) -> dict[str, NDArray[Any]]:
    data = demonstrations.buffer.data
    if not all(isinstance(array, np.ndarray) and not isinstance(array, np.memmap) for array in data.values()):
        raise DataError(f"{does} in memory: set data.in_memory=true")
    return {key: np.asarray(array) for key, array in data.items()}


def _replaced(demonstrations: Demonstrations, arrays: Mapping[str, Array], ends: NDArray[np.int64]) -> Demonstrations:
    buffer = ReplayBuffer(dict(arrays), ends, demonstrations.buffer.meta, check_finite=False)
    return Demonstrations(buffer, demonstrations.spec)


def _name(task: Task | None) -> str:
    return "none" if task is None else task.spec.name


def _check_unset(config: DictConfig, task: Task) -> None:
    """Refuse options that would do nothing."""
    for name in ("observations", "control_hz", "discrete"):
        if config.data[name]:
            raise UsageError(
                f"data.{name} does nothing for task '{_name(task)}', which brings its own: "
                f"leave it out or set task=none"
            )


def _keys(config: DictConfig, task: Task | None) -> dict[str, DatasetKey]:
    """Where the data set keeps each observation: as told, else under its own name, else as the public sets do."""
    names = list(config.data.observations) if task is None else list(task.spec.observations)
    if not names:
        raise DataError("data.observations is empty: with task=none it lists the keys that the policy sees")
    strange = sorted(set(config.data.names) - set(names))
    if strange:
        raise DataError(f"data.names.{strange[0]} names no observation of the task; it has {', '.join(names)}")
    stored = open_source(config.dataset).columns
    public: Mapping[str, DatasetKey] = {} if task is None else task.dataset_keys
    told = {key: DatasetKey(name) for key, name in config.data.names.items()}
    usual = {key: public[key] for key in names if key in public and key not in stored}
    keys = {key: DatasetKey(key) for key in names} | usual | told
    _check_seen(names, keys)
    return keys


def _check_seen(names: list[str], keys: Mapping[str, DatasetKey]) -> None:
    """Refuse the same observation twice, and the answer among what the policy sees."""
    twice = sorted(name for name in set(names) if names.count(name) > 1)
    if twice:
        raise DataError(f"data.observations names '{twice[0]}' twice: name it once")
    leaks = [name for name, stored in keys.items() if stored.key == ACTION]
    if leaks:
        raise DataError(
            f"observation '{leaks[0]}' is read from key '{ACTION}', which the policy is to predict: "
            f"name another key in data.observations or data.names"
        )


def _read(buffer: ReplayBuffer, stored: DatasetKey) -> Array:
    array = buffer.array(stored.key)
    try:
        return array if stored.read is None else stored.read(np.asarray(array))
    except IndexError:
        raise DataError(
            f"{buffer.source}: '{stored.key}' of shape {list(array.shape)} is not what the task reads from it: "
            f"give the observations under their own names, or tell them with data.names"
        ) from None


def _spec(config: DictConfig, task: Task | None, buffer: ReplayBuffer, arrays: Mapping[str, Array]) -> PolicySpec:
    action_dim = math.prod(buffer.array(ACTION).shape[1:])
    if task is None:
        observations, hz = {key: _spec_of(array) for key, array in arrays.items()}, config.data.control_hz
        discrete = tuple(config.data.discrete)
        hz = buffer.control_hz if hz is None else hz
        if hz is None:
            raise DataError(f"{buffer.source} does not tell its control rate: set data.control_hz")
    else:
        observations, hz, discrete = dict(task.spec.observations), task.spec.control_hz, task.spec.discrete
        _check_task(task, buffer, action_dim)
    scale = config.data.discrete_scale
    return PolicySpec(
        observations, action_dim, control_hz=hz, discrete=discrete, discrete_scale=scale, **config.horizon
    )


def _spec_of(array: Array) -> ArraySpec:
    return ArraySpec(tuple(array.shape[1:]) or (1,), "uint8" if array.dtype == np.uint8 else "float32")


def _check_task(task: Task, buffer: ReplayBuffer, action_dim: int) -> None:
    name, hz = task.spec.name, task.spec.control_hz
    if action_dim != task.spec.action_dim:
        raise DataError(f"{buffer.source} has {action_dim} action dimensions, task '{name}' has {task.spec.action_dim}")
    if buffer.control_hz is not None and not math.isclose(buffer.control_hz, hz, rel_tol=0.01):
        raise DataError(f"{buffer.source} was recorded at {buffer.control_hz:g} Hz, task '{name}' runs at {hz:g} Hz")


def _shaped(array: Array, key: str, wanted: ArraySpec, source: str) -> Array:
    shape = tuple(array.shape[1:]) or (1,)
    if shape == wanted.shape and (array.dtype == np.uint8) == (wanted.dtype == "uint8"):
        return array
    if math.prod(shape) == math.prod(wanted.shape) and wanted.dtype != "uint8":
        flat: NDArray[Any] = np.asarray(array)
        return flat.reshape(len(flat), *wanted.shape)
    raise DataError(
        f"{source}: observation '{key}' is {array.dtype} {list(shape)}, the task's is {wanted.dtype} "
        f"{list(wanted.shape)}: choose another task or map the key with +data.names.{key}=NAME"
    )
