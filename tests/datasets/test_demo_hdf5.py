from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from flowsteer.datasets import DataError, convert, open_dataset, write_robomimic, write_zarr

ENV_ARGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}


@pytest.fixture
def robomimic_file(tmp_path):
    """Eleven demonstrations, so that demo_10 must come after demo_9; action = demo number."""
    path = tmp_path / "low_dim.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ENV_ARGS)
        for number in range(11):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = 3
            demo.attrs["model_file"] = f"<model {number}>"
            demo["actions"] = np.full((3, 7), float(number))
            demo["rewards"], demo["dones"] = np.zeros(3), np.array([0, 0, 1])
            demo["states"] = np.zeros((3, 5))
            demo["obs/object"] = number + 0.1 * np.arange(3)[:, None]
            demo["next_obs/object"] = number + 0.1 * np.arange(1, 4)[:, None]
            demo["obs/agentview_image"] = np.full((3, 16, 16, 3), number, np.uint8)
        file["mask/train"] = np.array([b"demo_0"])
    return path


def test_a_robomimic_file(robomimic_file):
    buffer = open_dataset(robomimic_file)
    assert set(buffer.data) == {"action", "reward", "done", "states", "object", "agentview_image"}
    assert buffer.episode_ends.tolist() == list(range(3, 34, 3))
    assert buffer.data["action"][::3, 0].tolist() == list(range(11))
    assert buffer.data["action"].dtype == np.float64
    assert buffer.data["agentview_image"][-1, 0, 0, 0] == 10
    assert buffer.meta["env_args"] == ENV_ARGS
    assert (buffer.meta["format"], buffer.control_hz) == ("robomimic HDF5", 20)
    assert buffer.meta["episodes"]["model_file"][10] == "<model 10>"


def test_next_observations_are_read_by_name(robomimic_file):
    buffer = open_dataset(robomimic_file, keys=["next_obs/object", "object"])
    np.testing.assert_allclose(buffer.data["next_obs/object"] - buffer.data["object"], 0.1)


def test_images_may_stay_on_disk(robomimic_file):
    buffer = open_dataset(robomimic_file, in_memory=False)
    assert isinstance(buffer.data["agentview_image"], np.memmap)
    assert not isinstance(buffer.data["object"], np.memmap)
    assert buffer.data["agentview_image"][:, 3, 4, 1].tolist() == np.repeat(np.arange(11), 3).tolist()


def test_a_written_file_reads_back(make_buffer, tmp_path):
    buffer = make_buffer((4, 6), images=True, env_args=ENV_ARGS, episodes={"model_file": ["<a>", "<b>"]})
    path = write_robomimic(buffer, tmp_path / "d.hdf5")
    found = open_dataset(path)
    for key, array in buffer.data.items():
        np.testing.assert_array_equal(found.data[key], array)
    assert found.episode_ends.tolist() == [4, 10]
    assert found.data["done"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert (found.meta["env_args"], found.control_hz) == (ENV_ARGS, 20)
    assert found.meta["episodes"] == {"model_file": ["<a>", "<b>"]}
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == 10
        assert file["data/demo_1"].attrs["num_samples"] == 6
        assert file["data/demo_0/next_obs/state"][:, 0].tolist() == [1, 2, 3, 3]


def test_conversions_there_and_back_lose_nothing(robomimic_file, tmp_path):
    first = open_dataset(robomimic_file)
    convert(robomimic_file, tmp_path / "a.zarr")
    back = open_dataset(convert(tmp_path / "a.zarr", tmp_path / "b.hdf5"))
    assert back.data.keys() == first.data.keys()
    for key, array in first.data.items():
        np.testing.assert_array_equal(back.data[key], array)
        assert back.data[key].dtype == array.dtype
    assert {**back.meta, "source": ""} == {**first.meta, "source": ""}


def test_an_action_is_needed_to_write(make_buffer, tmp_path):
    buffer = make_buffer()
    del buffer.data["action"]
    with pytest.raises(DataError, match="no key 'action'"):
        write_robomimic(buffer, tmp_path / "d.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(robomimic_file):
    content = robomimic_file.read_bytes()
    robomimic_file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"low_dim.hdf5: the HDF5 file is truncated or damaged .*: copy or download"):
        open_dataset(robomimic_file)


def test_a_foreign_file_is_refused(tmp_path):
    with h5py.File(tmp_path / "weather.hdf5", "w") as file:
        file["data/rain"] = np.zeros(3)
    with pytest.raises(DataError, match=r"weather.hdf5: an HDF5 file without 'data/demo_\*/actions'"):
        open_dataset(tmp_path / "weather.hdf5")


def remove_observation(file):
    del file["data/demo_4/obs/object"]


def widen_action(file):
    del file["data/demo_4/actions"]
    file["data/demo_4/actions"] = np.zeros((3, 6))


def cut_reward(file):
    del file["data/demo_4/rewards"]
    file["data/demo_4/rewards"] = np.zeros(2)


def spoil_action(file):
    file["data/demo_4/actions"][1, 2] = np.nan


def empty_episode(file):
    for name in ("actions", "rewards", "dones", "states", "obs/object", "next_obs/object", "obs/agentview_image"):
        shape, dtype = file[f"data/demo_4/{name}"].shape[1:], file[f"data/demo_4/{name}"].dtype
        del file[f"data/demo_4/{name}"]
        file[f"data/demo_4/{name}"] = np.zeros((0, *shape), dtype)
    file["data/demo_4"].attrs["num_samples"] = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_observation, "'data/demo_4' and the first demonstration differ in key 'obs/object'"),
        (widen_action, r"'data/demo_4/actions' is \(6,\) wide, the first is \(7,\)"),
        (cut_reward, "'data/demo_4/rewards' has 2 frames and not num_samples: the file is incomplete"),
        (spoil_action, r"key 'action' holds a NaN or infinite value at frame 13 \(episode 4\)"),
        (empty_episode, "episode 4 has 0 frames"),
    ],
)
def test_wrong_content_is_refused(robomimic_file, damage, message):
    with h5py.File(robomimic_file, "a") as file:
        damage(file)
    with pytest.raises(DataError, match=message) as refused:
        open_dataset(robomimic_file)
    assert str(robomimic_file) in str(refused.value)


def test_a_zarr_store_with_env_args_keeps_them_for_robomimic(make_buffer, tmp_path):
    write_zarr(make_buffer(env_args=ENV_ARGS), tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert json.loads(file["data"].attrs["env_args"]) == ENV_ARGS
