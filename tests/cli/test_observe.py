from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flowsteer.cli.main import main
from flowsteer.cli.observe import observe
from flowsteer.datasets.demo_hdf5 import write_robomimic
from flowsteer.datasets.opening import open_dataset
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.sim.tasks.robosuite import Lift, task_from_env_args


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def human(shared_data: Path) -> str:
    pytest.importorskip("robosuite")
    return str(shared_data / "robosuite_human_1.4" / "lift" / "demo.hdf5")


def test_raw_demonstrations_get_observations_where_asked(
    human: str, here: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "convert", human, "plain.zarr"]) == 0
    assert "no observations: --observe adds what robosuite sees in them" in capsys.readouterr().out
    assert main(["data", "convert", human, "seen.hdf5", "--observe"]) == 0
    assert capsys.readouterr().out == "seen.hdf5\n"
    plain, seen = open_dataset("plain.zarr"), open_dataset("seen.hdf5")
    assert plain.data.keys() == {"action", "states"}
    task = task_from_env_args(seen.meta["env_args"])
    assert {key: array.shape for key, array in task.spec.observations.items()} == {
        key: seen.data[key].shape[1:] for key in task.spec.observations
    }
    for key, array in plain.data.items():
        np.testing.assert_array_equal(seen.data[key], array)
    assert seen.episode_ends.tolist() == plain.episode_ends.tolist() == [482, 992, 1384]
    # Of time (1), arm (7), fingers (2), cube (3 + 4); the cube's position is what its joint says.
    np.testing.assert_allclose(seen.data["object"][:, :3], plain.data["states"][:, 10:13], atol=1e-6)
    np.testing.assert_allclose(seen.data["robot0_gripper_qpos"], plain.data["states"][:, 8:10], atol=1e-6)
    assert main(["train", "task=robomimic", "dataset=seen.hdf5", "policy=flow", *tiny, "train.steps=1", "out=run"]) == 0


def test_what_is_observed_is_what_the_simulator_showed() -> None:
    pytest.importorskip("robosuite")
    task, rng = Lift(object_layout="1.5"), np.random.default_rng(0)
    env, actions = task.make(), rng.uniform(-1, 1, (4, 7))
    shown, states = [env.reset(0)], []
    for action in actions:
        states.append(np.concatenate([[env._data.time], env._data.qpos, env._data.qvel]))
        shown.append(env.step(action).observation)
    env.close()
    args = task.env_args()
    args["env_kwargs"] |= {"use_camera_obs": True}
    buffer = ReplayBuffer({"action": actions, "states": np.array(states)}, np.array([4]), {"env_args": args})
    seen = observe(buffer)
    for key in task.spec.observations:
        np.testing.assert_allclose(seen.data[key], [o[key] for o in shown[:-1]], atol=1e-5, err_msg=key)
    assert task_from_env_args(seen.meta["env_args"]).spec == task.spec
    assert args["env_kwargs"]["use_camera_obs"] is True, "what was given stays as it was"


@pytest.mark.parametrize(
    ("states", "env_args", "code", "message"),
    [
        (None, {"env_name": "Lift"}, 2, "raw.hdf5 holds no states, which --observe needs: leave it out, or give"),
        (9, {}, 1, "env_args: env_name 'None' is unknown, choose one of ['Lift', "),
        (9, {"env_name": "Wipe"}, 1, "env_args: env_name 'Wipe' is unknown, choose one of ['Lift', "),
    ],
)
def test_what_cannot_be_observed_is_one_line(
    states: int | None,
    env_args: dict[str, str],
    code: int,
    message: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"action": np.zeros((2, 7))} | ({} if states is None else {"states": np.zeros((2, states))})
    write_robomimic(ReplayBuffer(data, np.array([2]), {"env_args": env_args}), here / "raw.hdf5")
    assert main(["data", "convert", "raw.hdf5", "seen.zarr", "--observe"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert os.listdir(here) == ["raw.hdf5"]


def test_states_of_another_world_and_second_observations_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("robosuite")
    args = {"env_name": "Lift", "env_version": "1.4.0"}
    raw = {"action": np.zeros((2, 7)), "states": np.zeros((2, 9))}
    write_robomimic(ReplayBuffer(dict(raw), np.array([2]), {"env_args": args}), here / "raw.hdf5")
    assert main(["data", "convert", "raw.hdf5", "seen.zarr", "--observe"]) == 1
    assert capsys.readouterr().err.endswith("lift: a state has 32 numbers, got [9]\n")
    both = {**raw, "object": np.zeros((2, 10))}
    write_robomimic(ReplayBuffer(dict(both), np.array([2]), {"env_args": args}), here / "both.hdf5")
    assert main(["data", "convert", "both.hdf5", "seen.zarr", "--observe"]) == 2
    assert "both.hdf5 holds observations already, such as 'object': leave out --observe" in capsys.readouterr().err
    assert sorted(os.listdir(here)) == ["both.hdf5", "raw.hdf5"]
