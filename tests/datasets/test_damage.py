"""Damaged and foreign files are refused in one line that names them; nothing else ever comes out of a reader."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from flowsteer.datasets import DataError, convert, inspect, open_dataset, write_robomimic, write_zarr
from flowsteer.datasets.opening import open_source


def refusal(path, look=open_dataset):
    """The text of the DataError, one line that names the path."""
    with pytest.raises(DataError) as caught:
        look(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.fixture
def robomimic(make_buffer, tmp_path):
    return write_robomimic(make_buffer(), tmp_path / "d.hdf5", {"env_name": "Lift"})


@pytest.fixture
def store(make_buffer, tmp_path):
    return write_zarr(make_buffer(), tmp_path / "d.zarr")


def test_hdf5_whose_data_is_no_group(tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["data"] = np.zeros(3)
    assert "without 'data/demo_*/actions': give a robomimic" in refusal(tmp_path / "d.hdf5")


def test_hdf5_whose_demonstration_is_no_group(tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["data/demo_0"] = np.zeros(3)
    assert "without 'data/demo_*/actions'" in refusal(tmp_path / "d.hdf5")


def test_hdf5_with_a_single_number_as_actions(robomimic):
    with h5py.File(robomimic, "a") as file:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = 1.0
    assert "cannot be read (TypeError" in refusal(robomimic)


def test_hdf5_whose_env_args_are_not_json(robomimic):
    with h5py.File(robomimic, "a") as file:
        file["data"].attrs["env_args"] = "{'env_name': 'Lift'}"
    assert "attribute 'env_args' is not JSON (" in refusal(robomimic)
    with h5py.File(robomimic, "a") as file:
        file["data"].attrs["env_args"] = "[1]"
    refusal(robomimic)


def test_hdf5_whose_env_kwargs_are_text(robomimic):
    with h5py.File(robomimic, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": "{}"})
    assert "env_kwargs in attribute 'env_args' is no object but '{}': write it again" in refusal(robomimic)


@pytest.mark.parametrize("name", ["d.zarr", "d.hdf5"])
@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_writing_where_a_file_stands_in_for_the_folder(name, parent, store, tmp_path):
    (tmp_path / "file").write_text("here first")
    target = tmp_path / parent / name
    told = refusal(target, lambda path: convert(store, path))
    assert told.startswith(f"{target}: cannot be written ("), told
    assert (tmp_path / "file").read_text() == "here first"


def test_minari_episode_without_rewards(tmp_path):
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        file["episode_0/actions"] = np.zeros((3, 1))
    assert "rewards" in refusal(tmp_path / "main_data.hdf5")


def test_minari_facts_cut_short(tmp_path):
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        file["episode_0/actions"], file["episode_0/rewards"] = np.zeros((3, 1)), np.zeros(3)
    (tmp_path / "metadata.json").write_text('{"dataset_id": "do')
    assert str(tmp_path / "metadata.json") in refusal(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({"env_spec": "{"}))
    assert "metadata.json: 'env_spec' is not JSON" in refusal(tmp_path)


def test_zarr_with_damaged_episode_ends(store):
    chunk = store / "meta/episode_ends/c/0"
    chunk.write_bytes(chunk.read_bytes()[:3])
    refusal(store)
    (store / "meta/episode_ends/zarr.json").write_text("{")
    refusal(store)


@pytest.mark.parametrize("ends", [np.array(5), np.array([["a"]]), np.array([1.5, 5.0]), np.array([np.nan])])
def test_episode_ends_that_are_none(ends, tmp_path):
    root = zarr.open_group(tmp_path / "d.zarr", mode="w")
    root.create_array("data/action", data=np.zeros((5, 2)))
    np.savez(tmp_path / "d.npz", actions=np.zeros((5, 2)), episode_ends=ends)
    assert "key 'episode_ends' must be whole numbers [E]" in refusal(tmp_path / "d.npz")
    if ends.dtype.kind != "U":
        root.create_array("meta/episode_ends", data=ends)
        assert "key 'episode_ends' must be whole numbers [E]" in refusal(tmp_path / "d.zarr")


def test_whole_episode_ends_of_any_type_are_taken(tmp_path):
    np.savez(tmp_path / "d.npz", actions=np.zeros((5, 2)), episode_ends=np.array([2.0, 5.0]))
    assert open_dataset(tmp_path / "d.npz").episode_ends.tolist() == [2, 5]


def test_zarr_with_a_single_number_among_its_arrays(store):
    zarr.open_group(store, mode="a").create_array("data/rate", data=np.array(10.0))
    assert "key 'rate' is a single number" in refusal(store)


@pytest.mark.parametrize("look", [inspect, open_dataset])
def test_text_is_told_and_left_out(look, tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, actions=np.zeros((5, 2)), note=np.array(list("abcde")), episode_ends=np.array([5]))
    look(path)
    assert set(open_dataset(path).data) == {"action"}
    assert {key.key: key.note for key in inspect(path).keys} == {"action": "", "note": "not numbers"}
    with pytest.raises(DataError, match=r"d.npz: key 'note' holds <U1 and not numbers: leave it out"):
        open_dataset(path, keys=["note"])


def test_text_as_actions(tmp_path):
    np.savez(tmp_path / "d.npz", actions=np.array(list("abcde")), episode_ends=np.array([5]))
    assert "key 'action' holds <U1 and not numbers" in refusal(tmp_path / "d.npz", inspect)


def test_an_archive_with_a_damaged_directory(tmp_path):
    np.savez(tmp_path / "d.npz", actions=np.zeros((5, 2)), episode_ends=np.array([5]))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 1] ^= 0xFF
    (tmp_path / "d.npz").write_bytes(content)
    assert zipfile.is_zipfile(tmp_path / "d.npz")
    refusal(tmp_path / "d.npz")


def test_an_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "d.hdf5").write_bytes(b"x")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "Permission denied" in refusal(tmp_path / "d.hdf5", open_source)
