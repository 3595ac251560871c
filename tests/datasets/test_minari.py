from __future__ import annotations

import json
import sys

import h5py
import imageio.v3 as iio
import numpy as np
import pytest

from flowsteer.datasets import DataError, open_dataset


@pytest.fixture
def folder(tmp_path):
    """Twelve episodes of 2 + number % 3 steps with a dictionary observation, one entry of it JPEG images."""
    data = tmp_path / "door/human-v2/data"
    data.mkdir(parents=True)
    (data / "metadata.json").write_text(json.dumps({"dataset_id": "door/human-v2", "env_spec": '{"id": "Door-v1"}'}))
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for number in range(12):
            steps, episode = 2 + number % 3, file.create_group(f"episode_{number}")
            episode["actions"] = np.full((steps, 2), float(number))
            episode["rewards"] = np.arange(steps, dtype=float)
            episode["terminations"] = np.zeros(steps, bool)
            episode["truncations"] = np.arange(steps) == steps - 1
            episode["observations/goal"] = number + np.arange(steps + 1)[:, None]
            encoded = [iio.imwrite("<bytes>", np.full((16, 16, 3), 9 * number, np.uint8), extension=".jpg")] * (
                steps + 1
            )
            kind = h5py.vlen_dtype(np.uint8)
            pixels = episode.create_dataset("observations/pixels", (steps + 1,), dtype=kind)
            for step, picture in enumerate(encoded):
                pixels[step] = np.frombuffer(picture, np.uint8)
            episode["infos/noise"] = np.zeros(steps)
    return data.parent


def test_the_folder_its_data_and_its_file_are_the_same(folder):
    for path in (folder, folder / "data", folder / "data/main_data.hdf5"):
        buffer = open_dataset(path)
        assert set(buffer.data) == {"action", "reward", "terminated", "truncated", "goal", "pixels"}
        assert buffer.episode_lengths.tolist() == [2, 3, 4] * 4
    assert buffer.data["action"][buffer.episode_starts, 0].tolist() == list(range(12))
    assert buffer.data["goal"][:5, 0].tolist() == [0, 1, 1, 2, 3]  # the observation after the last action is left out
    assert buffer.data["pixels"].shape == (36, 16, 16, 3)
    assert buffer.data["pixels"][-1, 8, 8].tolist() == pytest.approx([99] * 3, abs=2)
    assert buffer.meta["env_spec"] == {"id": "Door-v1"}
    assert buffer.meta["dataset_id"] == "door/human-v2"


def test_a_foreign_file_is_refused(folder):
    with h5py.File(folder / "data/main_data.hdf5", "w") as file:
        file["rain"] = np.zeros(3)
    with pytest.raises(DataError, match=r"main_data.hdf5: no 'episode_\*/actions' there"):
        open_dataset(folder)


def test_a_truncated_file_is_refused(folder):
    file = folder / "data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match="truncated or damaged"):
        open_dataset(folder)


def test_without_the_package_a_name_asks_for_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(
        DataError, match=r"minari:door/human-v2: needs the package minari: pip install 'flowsteer\[minari"
    ):
        open_dataset("minari:door/human-v2")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_data_set_written_by_the_package_is_read_by_name(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = [
        EpisodeBuffer(
            id=number,
            observations=np.full((steps + 1, 3), number, np.float32),
            actions=np.full((steps, 1), number, np.float32),
            rewards=np.zeros(steps),
            terminations=np.zeros(steps, bool),
            truncations=np.arange(steps) == steps - 1,
            infos={},
        )
        for number, steps in enumerate((4, 7))
    ]
    space = {"observation_space": Box(-9, 9, (3,)), "action_space": Box(-9, 9, (1,))}
    facts = {"algorithm_name": "none", "author": "a", "author_email": "b", "code_permalink": "c"}
    minari.create_dataset_from_buffers("tests/small-v0", episodes, **space, **facts)
    buffer = open_dataset("minari:tests/small-v0")
    assert buffer.episode_ends.tolist() == [4, 11]
    assert buffer.data["observation"][[3, 4]].tolist() == [[0] * 3, [1] * 3]
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("none")))
    with pytest.raises(DataError, match="minari:tests/other-v0: cannot be loaded"):
        open_dataset("minari:tests/other-v0")
