"""robomimic HDF5 files (`data/demo_i` with `actions`, `obs/*`, `next_obs/*`) and robosuite's raw `demo.hdf5`.

Keys: observations under their bare names (`object`, `robot0_eef_pos`, `agentview_image`), `actions` as `action`,
`rewards` as `reward`, `dones` as `done`; `states` (simulator states) and the rest as they are named. `next_obs/*`
repeats the observations one step later, so it is read only where a key names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets import json_text
from flowsteer.datasets.errors import DataError
from flowsteer.datasets.replay_buffer import ACTION, ReplayBuffer
from flowsteer.datasets.source import Column, Reader, Source
from flowsteer.datasets.temporary import ForgivingFile, replaced_by

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
NAMES = {"actions": ACTION, "rewards": "reward", "dones": "done"}
NOT_OBSERVED = {ACTION: "actions", "reward": "rewards", "done": "dones", "states": "states"}
NEXT_OBS = "next_obs/"
EPISODE_ATTRIBUTES = ("model_file", "ep_meta")


def is_hdf5(path: Path) -> bool:
    """Whether the file starts as an HDF5 file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(HDF5_MAGIC)) == HDF5_MAGIC


def open_hdf5(path: Path) -> h5py.File:
    """Open for reading.

    Raises:
        DataError: if the file is truncated.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            f"{path}: the HDF5 file is truncated or damaged ({error}): copy or download it again"
        ) from error


def open_source(path: Path) -> Source:
    """Describe the file at `path`.

    Raises:
        DataError: if it is truncated, foreign, or its demonstrations differ in their keys.
    """
    with open_hdf5(path) as file:
        demos = _demo_names(path, file)
        datasets = [_datasets(file[name]) for name in demos]
        lengths = np.array([len(file[name]["actions"]) for name in demos])
        for name, there in zip(demos, datasets, strict=True):
            _check_demo(path, name, file[name], there, datasets[0])
        columns = {
            _key(name): Column(
                int(sum(len(file[demo][name]) for demo in demos)),
                dataset.shape[1:],
                dataset.dtype,
                lambda name=name: _read(path, demos, name),  # type: ignore[misc]
                by_default=not name.startswith(NEXT_OBS),
                note="only if named" if name.startswith(NEXT_OBS) else "",
            )
            for name, dataset in datasets[0].items()
        }
        return Source(path, columns, np.cumsum(lengths), _meta(path, file["data"], [file[name] for name in demos]))


def _demo_names(path: Path, file: h5py.File) -> list[str]:
    data = file.get("data")
    groups = data.items() if isinstance(data, h5py.Group) else ()
    names = [f"data/{name}" for name, demo in groups if isinstance(demo, h5py.Group) and "actions" in demo]
    if not names:
        raise DataError(f"{path}: an HDF5 file without 'data/demo_*/actions': give a robomimic or robosuite file")
    return sorted(names, key=lambda name: (len(name), name))


def _datasets(demo: h5py.Group) -> dict[str, h5py.Dataset]:
    found: dict[str, h5py.Dataset] = {}
    demo.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return {name: item for name, item in found.items() if item.dtype.kind in "fiub" and item.ndim > 0}


def _check_demo(
    path: Path, name: str, demo: h5py.Group, there: dict[str, h5py.Dataset], first: dict[str, h5py.Dataset]
) -> None:
    if there.keys() != first.keys():
        differing = sorted(there.keys() ^ first.keys())[0]
        raise DataError(f"{path}: '{name}' and the first demonstration differ in key '{differing}': convert them again")
    for key, dataset in there.items():
        if dataset.shape[1:] != first[key].shape[1:]:
            raise DataError(f"{path}: '{name}/{key}' is {dataset.shape[1:]} wide, the first is {first[key].shape[1:]}")
        if len(dataset) != demo.attrs.get("num_samples", len(demo["actions"])):
            raise DataError(
                f"{path}: '{name}/{key}' has {len(dataset)} frames and not num_samples: "
                f"the file is incomplete, copy it again"
            )


def _key(name: str) -> str:
    return NAMES.get(name, name.removeprefix("obs/"))


def _read(path: Path, demos: list[str], name: str) -> Iterator[NDArray[Any]]:
    with open_hdf5(path) as file:
        for demo in demos:
            yield file[demo][name][:]


def _meta(path: Path, data: h5py.Group, demos: list[h5py.Group]) -> dict[str, Any]:
    meta: dict[str, Any] = {"format": "robomimic HDF5" if "env_args" in data.attrs else "robosuite demo.hdf5"}
    if "env_args" in data.attrs:
        meta["env_args"] = _attribute(path, data, "env_args")
    elif "env_info" in data.attrs:
        kwargs = _attribute(path, data, "env_info")
        version = str(data.attrs.get("repository_version", ""))
        meta["env_args"] = {
            "env_name": kwargs.pop("env_name", str(data.attrs.get("env", ""))),
            "env_version": version,
            "type": 1,
            "env_kwargs": kwargs,
        }
    rate = meta.get("env_args", {}).get("env_kwargs", {}).get("control_freq") or _simulated_hz(demos[0])
    if rate:
        meta["control_hz"] = rate
    episodes = {key: [str(demo.attrs[key]) for demo in demos] for key in EPISODE_ATTRIBUTES if key in demos[0].attrs}
    return {**meta, "episodes": episodes} if episodes else meta


def _attribute(path: Path, data: h5py.Group, name: str) -> dict[str, Any]:
    told = json_text.parse(data.attrs[name], f"{path}: attribute '{name}'")
    if not isinstance(told, dict):
        raise DataError(f"{path}: attribute '{name}' is no JSON object but {told!r:.40}: write it again")
    kwargs = told.get("env_kwargs", {})
    if not isinstance(kwargs, dict):
        raise DataError(f"{path}: env_kwargs in attribute '{name}' is no object but {kwargs!r:.40}: write it again")
    return told


def _simulated_hz(demo: h5py.Group) -> float | None:
    """The rate of simulator time, the first entry of robosuite's flattened states."""
    if "states" not in demo or len(demo["states"]) < 2:
        return None
    steps_s = np.diff(demo["states"][:, 0])
    step_s = float(np.median(steps_s))
    return round(1 / step_s, 6) if step_s > 0 and np.allclose(steps_s, step_s, rtol=1e-3) else None


def write_robomimic(buffer: ReplayBuffer, path: Path | str, env_args: dict[str, Any] | None = None) -> Path:
    """Write `buffer` as a robomimic HDF5 file.

    Every key that is not an action, reward, done or simulator state becomes an observation. `next_obs` is the
    observation one step later; an episode's last one repeats, unless the buffer has `next_obs/*` itself. `dones` is
    1 at each episode's last step if the buffer has none.

    env_args: robomimic's description of the environment; `buffer.meta["env_args"]` if not given.

    Raises:
        DataError: if `path` exists, the disk is full or there is no action; then nothing is left behind.
    """
    buffer.array(ACTION)
    with replaced_by(Path(path)) as partial, ForgivingFile(partial, "w+") as disk:
        with h5py.File(disk, "w") as file:
            _write_demos(file, buffer, env_args or buffer.meta.get("env_args", {}), disk.raise_error)
        disk.raise_error()
    return Path(path)


def _write_demos(
    file: h5py.File, buffer: ReplayBuffer, env_args: dict[str, Any], check_disk: Callable[[], None]
) -> None:
    data = file.create_group("data")
    data.attrs["total"] = buffer.num_frames
    data.attrs["env_args"] = json.dumps(env_args)
    for episode, (start, end) in enumerate(zip(buffer.episode_starts, buffer.episode_ends, strict=True)):
        demo = data.create_group(f"demo_{episode}")
        demo.attrs["num_samples"] = int(end - start)
        for name, values in buffer.meta.get("episodes", {}).items():
            demo.attrs[name] = values[episode]
        _write_demo(demo, buffer, int(start), int(end))
        check_disk()


def _write_demo(demo: h5py.Group, buffer: ReplayBuffer, start: int, end: int) -> None:
    for key, array in buffer.data.items():
        frames = np.asarray(array[start:end])
        observed = key not in NOT_OBSERVED and not key.startswith(NEXT_OBS)
        demo.create_dataset(f"obs/{key}" if observed else NOT_OBSERVED.get(key, key), data=frames)
        if observed and NEXT_OBS + key not in buffer.data:
            demo.create_dataset(NEXT_OBS + key, data=np.concatenate([frames[1:], frames[-1:]]))
    if "done" not in buffer.data:
        demo.create_dataset("dones", data=np.arange(start, end) == end - 1, dtype=np.int64)


READER = Reader("robomimic or robosuite HDF5", is_hdf5, open_source)
