"""The readers on real recordings; numbers from the recordings' own descriptions."""

from __future__ import annotations

import numpy as np
import pytest

from flowsteer.datasets import DataError, Windows, convert, inspect, open_dataset, statistics


def test_push_t_from_human_demonstrations(shared_data):
    path = shared_data / "pusht_human/pusht_cchi_v7_replay.zarr"
    buffer = open_dataset(path, keys=["action", "state", "keypoint", "n_contacts"])
    assert (buffer.num_episodes, buffer.num_frames) == (206, 25_650)
    assert {key: array.shape[1:] for key, array in buffer.data.items()} == {
        "action": (2,),
        "state": (5,),
        "keypoint": (9, 2),
        "n_contacts": (1,),
    }
    found = statistics(buffer, ["action", "state"])
    assert (found["action"].min >= 0).all()
    assert (found["action"].max <= 512).all()
    assert 0 <= found["state"].min[4] < found["state"].max[4] <= 2 * np.pi + 1e-5
    # Diffusion Policy's published sampler: length - 16 + 8 - 1 + 2 windows an episode.
    windows = Windows(buffer, ["state"], observation_steps=2, prediction_steps=16, execution_steps=8)
    assert len(windows) == 25_650 - 7 * 206


def test_push_t_images_become_bytes(shared_data, tmp_path):
    """Two episodes, in the layout of the whole."""
    import zarr

    stored = zarr.open_group(shared_data / "pusht_human/pusht_cchi_v7_replay.zarr", mode="r")
    small = zarr.open_group(tmp_path / "small.zarr", mode="w", zarr_format=2)
    ends = stored["meta/episode_ends"][:2]
    images = stored["data/img"][: ends[-1]]
    small.create_array("data/img", data=images, chunks=(161, 96, 96, 3))
    small.create_array("data/action", data=stored["data/action"][: ends[-1]])
    small.create_array("meta/episode_ends", data=ends)
    target = convert(tmp_path / "small.zarr", tmp_path / "bytes.zarr")
    buffer = open_dataset(target, in_memory=False)
    assert buffer.data["img"].dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(buffer.data["img"][:]), images)


@pytest.mark.parametrize(("name", "episodes", "frames", "width"), [("lift", 3, 1384, 7), ("wipe", 1, 174, 6)])
def test_raw_robosuite_demonstrations(shared_data, name, episodes, frames, width):
    buffer = open_dataset(shared_data / f"robosuite_human_1.4/{name}/demo.hdf5")
    assert (buffer.num_episodes, buffer.num_frames) == (episodes, frames)
    assert buffer.data["action"].shape == (frames, width)
    assert buffer.meta["env_args"]["env_name"].lower() == name
    assert buffer.control_hz == 20
    assert len(buffer.meta["episodes"]["model_file"]) == episodes


def test_many_steps_of_the_lift_demonstrations_do_nothing(shared_data):
    report = inspect(shared_data / "robosuite_human_1.4/lift/demo.hdf5")
    assert report.noop_share == pytest.approx(0.814, abs=0.001)
    action = next(key for key in report.keys if key.key == "action")
    assert [channel.name for channel in action.channels if channel.constant] == ["3", "4"]


def test_piper_without_its_videos(shared_data):
    path = shared_data / "piper_lerobot_v30"
    buffer = open_dataset(path)
    assert (buffer.num_episodes, buffer.num_frames, buffer.control_hz) == (55, 13_331, 15)
    assert buffer.data["action"].shape == (13_331, 6)
    assert buffer.data["observation.state"].shape == (13_331, 7)
    assert buffer.meta["episodes"]["task"][0] == "Put the grape on the white plate."
    with pytest.raises(DataError, match=r"observation.images.front.*absent"):
        open_dataset(path, keys=["observation.images.front"])


def test_so101_with_av1_video(shared_data):
    buffer = open_dataset(shared_data / "so101_ros2_lerobot_v30", image_size=(45, 80), in_memory=False)
    assert (buffer.num_episodes, buffer.num_frames, buffer.control_hz) == (6, 1_782, 30)
    video = buffer.data["observation.images.wrist"]
    assert video.shape == (1_782, 45, 80, 3)
    assert video[[0, 900, -1]].std() > 10


def test_gr1_with_h264_video(shared_data):
    buffer = open_dataset(shared_data / "gr1_lerobot_v20", image_size=(64, 64))
    assert (buffer.num_episodes, buffer.num_frames, buffer.control_hz) == (5, 2_096, 20)
    assert buffer.data["observation.state"].shape == (2_096, 44)
    assert buffer.data["observation.images.ego_view"].shape == (2_096, 64, 64, 3)
    assert "observation.images.egoview" not in buffer.data
    assert len(set(buffer.meta["episodes"]["task"])) > 1


def test_adroit_door(shared_data):
    buffer = open_dataset(shared_data / "adroit_door_human/door_human.npz")
    assert (buffer.num_episodes, buffer.num_frames) == (25, 6_729)
    assert buffer.data["observation"].shape == (6_729, 39)
    assert buffer.data["action"].shape == (6_729, 28)


def test_every_real_set_can_be_inspected(shared_data):
    for name in ("pusht_human/pusht_cchi_v7_replay.zarr", "gr1_lerobot_v20", "so101_ros2_lerobot_v30"):
        report = inspect(shared_data / name)
        assert report.problem is None
        assert any(key.first_frame is not None for key in report.keys)


def test_a_folder_around_the_data_is_explained(shared_data):
    with pytest.raises(DataError, match=r"this folder only holds the data set: give .*pusht_cchi_v7_replay.zarr"):
        open_dataset(shared_data / "pusht_human")
