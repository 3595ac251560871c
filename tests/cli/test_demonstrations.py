"""What `train` refuses to make of a data set: an option that does nothing, a name that there is not, a leak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flowsteer.cli.main import main
from flowsteer.datasets.demo_hdf5 import write_robomimic
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.datasets.zarr_store import write_zarr

NO_TASK = ("task=none", "data.control_hz=10")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["sim.backend=thread"],
            2,
            "sim.backend 'thread' is unknown; nearest: threads (known: gym, ray, threads, warp)",
        ),
        (
            ["policy.normalizers={action: minmax}"],
            1,
            "the normaliser of key 'action' 'minmax' is unknown; nearest: min_max (known: identity, mean_std, min_max)",
        ),
        (["~train.lr"], 2, "option 'train.lr' cannot be deleted"),
        (
            ["task=none", "data.observations=[state]", "data.control_hz=0"],
            2,
            "data.control_hz must be positive, got 0.0",
        ),
        (
            ["data.control_hz=5"],
            2,
            "data.control_hz does nothing for task 'pusht', which brings its own: leave it out or set task=none",
        ),
        (
            ["data.observations=[state]"],
            2,
            "data.observations does nothing for task 'pusht', which brings its own: leave it out or set task=none",
        ),
        (
            ["data.discrete=[1]"],
            2,
            "data.discrete does nothing for task 'pusht', which brings its own: leave it out or set task=none",
        ),
        (
            [*NO_TASK, "data.observations=[state]", "data.discrete=[2]"],
            1,
            "discrete=[2] must name different dimensions from 0 to 1",
        ),
        (["data.discrete_scale=0"], 1, "discrete_scale must be in (0, 1], got 0"),
        (["horizon.execution_steps=0"], 1, "execution_steps must be at least 1, got 0"),
        (
            [*NO_TASK, "data.observations=[state,action]"],
            1,
            "observation 'action' is read from key 'action', which the policy is to predict: "
            "name another key in data.observations or data.names",
        ),
        (
            [*NO_TASK, "data.observations=[state,seen]", "+data.names.seen=action"],
            1,
            "observation 'seen' is read from key 'action', which the policy is to predict: "
            "name another key in data.observations or data.names",
        ),
        (
            [*NO_TASK, "data.observations=[state,state]"],
            1,
            "data.observations names 'state' twice: name it once",
        ),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    options: list[str],
    code: int,
    message: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    assert main(["train", f"dataset={dataset}", f"out={run}", "train.steps=2", *tiny, *options]) == code
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("env_args", "reason"),
    [
        ({}, " does not hold env_args: choose its task by name"),
        (
            {"env_name": "Door"},
            ": env_args: env_name 'Door' is unknown, choose one of ['Lift', 'NutAssemblySquare', 'PickPlaceCan']; "
            "correct it or choose a task by name",
        ),
    ],
)
def test_a_file_of_no_known_world_is_named(
    env_args: dict[str, str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    buffer = ReplayBuffer({"object": np.zeros((20, 10)), "action": np.zeros((20, 7))}, np.array([20]))
    file = write_robomimic(buffer, tmp_path / "demo.hdf5", env_args)
    assert main(["train", "task=robomimic", f"dataset={file}", f"out={tmp_path / 'run'}", *tiny]) == 1
    assert capsys.readouterr().err == f"error: {file}{reason}\n"
    assert not (tmp_path / "run").exists()


def test_not_a_number_is_refused_by_key_and_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: tuple[str, ...]
) -> None:
    action = np.zeros((20, 2))
    action[13, 1] = np.nan
    store = write_zarr(
        ReplayBuffer({"state": np.zeros((20, 5)), "action": action}, np.array([20]), check_finite=False),
        tmp_path / "d.zarr",
    )
    assert main(["train", f"dataset={store}", f"out={tmp_path / 'run'}", *tiny]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {store}: key 'action' holds a NaN or infinite value at frame 13 (episode 0)"), told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
