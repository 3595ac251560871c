from __future__ import annotations

import numpy as np
import pytest

from flowsteer.datasets import DataError, convert, open_dataset, write_robomimic, write_zarr


def test_a_missing_path_is_told(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "nothing.zarr")


def test_a_foreign_path_names_the_known_forms(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match=r"not a data set of a known form .*LeRobot.*: convert it"):
            open_dataset(path)


def test_a_folder_around_the_data_set_names_what_to_give(make_buffer, tmp_path):
    write_zarr(make_buffer(), tmp_path / "inner.zarr")
    with pytest.raises(DataError, match=r"this folder only holds the data set: give .*inner.zarr"):
        open_dataset(tmp_path)


def test_a_missing_key_names_the_nearest(make_buffer, tmp_path):
    path = write_robomimic(make_buffer(), tmp_path / "d.hdf5")
    with pytest.raises(DataError, match=r"d.hdf5: there is no key 'actions': did you mean 'action'\?"):
        open_dataset(path, keys=["actions"])
    with pytest.raises(DataError, match="there is no key 'xyz': it has "):
        open_dataset(path, keys=["xyz"])


def test_only_the_named_keys_are_loaded(make_buffer, tmp_path):
    path = write_zarr(make_buffer(images=True), tmp_path / "d.zarr")
    assert set(open_dataset(path, keys=["state"]).data) == {"state"}
    assert open_dataset(path, image_size=(6, 5), in_memory=False).data["img"].shape == (15, 6, 5, 3)


def test_an_unknown_target_format_is_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match=r"cannot tell the format from '.csv': end the name in .zarr, .hdf5, .h5"):
        convert(tmp_path / "nothing", tmp_path / "d.csv")


def test_nan_values_open_only_when_asked_for(make_buffer, tmp_path):
    buffer = make_buffer()
    buffer.data["state"][7, 1] = np.nan
    path = write_zarr(buffer, tmp_path / "d.zarr")
    with pytest.raises(DataError, match=r"d.zarr: key 'state' holds a NaN or infinite value at frame 7 \(episode 1\)"):
        open_dataset(path)
    assert np.isnan(open_dataset(path, strict=False).data["state"][7, 1])
    with pytest.raises(DataError, match="'state' holds a NaN"):
        convert(path, tmp_path / "e.zarr")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["d.zarr"]


def test_a_numpy_archive(tmp_path):
    actions = np.arange(10.0).reshape(5, 2)
    facts = {"actions": actions, "observations": actions + 1, "initial_states": np.zeros((2, 7)), "dt": np.float64(0.1)}
    np.savez(tmp_path / "d.npz", episode_ends=np.array([2, 5]), **facts)
    buffer = open_dataset(tmp_path / "d.npz")
    assert set(buffer.data) == {"action", "observation"}
    np.testing.assert_array_equal(buffer.data["action"], actions)
    np.savez(tmp_path / "e.npz", actions=actions)
    with pytest.raises(DataError, match=r"e.npz: there is no key 'episode_ends'"):
        open_dataset(tmp_path / "e.npz")


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "d.npz", episode_ends=np.array([1]), actions=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(DataError, match=r"d.npz: the archive cannot be read .*: save plain arrays"):
        open_dataset(tmp_path / "d.npz")
