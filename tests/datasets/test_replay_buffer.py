from __future__ import annotations

import numpy as np
import pytest
import zarr

from flowsteer.datasets import DataError, ReplayBuffer
from flowsteer.datasets.replay_buffer import blocks, rows


def test_episodes_of_a_buffer(make_buffer):
    buffer = make_buffer((4, 6, 5), control_hz=10)
    assert (buffer.num_frames, buffer.num_episodes, buffer.control_hz) == (15, 3, 10.0)
    assert buffer.episode_ends.dtype == np.int64
    assert buffer.episode_starts.tolist() == [0, 4, 10]
    assert buffer.episode_lengths.tolist() == [4, 6, 5]


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([], "'episode_ends' is empty"),
        ([3, 3, 6], "episode 1 has 0 frames: remove episodes of no length"),
        ([4, 3, 6], "episode 1 has -1 frames"),
        ([3, 5], "key 'action' has 6 frames but 'episode_ends' ends at 5"),
        ([3, 7], "the file is incomplete"),
    ],
)
def test_wrong_episode_ends_are_refused(ends, message):
    with pytest.raises(DataError, match=message) as refused:
        ReplayBuffer({"action": np.zeros((6, 2))}, np.array(ends), {"source": "demo.zarr"})
    assert str(refused.value).startswith("demo.zarr: ")
    assert "\n" not in str(refused.value)


def test_no_arrays_are_refused():
    with pytest.raises(DataError, match="no arrays"):
        ReplayBuffer({}, np.array([3]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_is_refused_with_its_place(bad):
    state = np.zeros((6, 2), np.float32)
    state[4, 1] = bad
    with pytest.raises(DataError, match=r"demo: key 'state' holds a NaN or infinite value at frame 4 \(episode 1\)"):
        ReplayBuffer({"state": state}, np.array([3, 6]), {"source": "demo"})
    assert ReplayBuffer({"state": state}, np.array([3, 6]), check_finite=False).num_frames == 6


def test_a_missing_key_names_the_nearest(make_buffer):
    with pytest.raises(DataError, match=r"no key 'stat': did you mean 'state'\? It has action, state"):
        make_buffer().array("stat")


def test_rows_of_a_zarr_array_equal_numpy(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (20, 3, 2), dtype=np.uint8)
    stored = zarr.create_array(tmp_path / "a.zarr", data=values, chunks=(1, 3, 2))
    wanted = np.array([7, 0, 7, 19, 3, 3])
    np.testing.assert_array_equal(rows(stored, wanted), values[wanted])
    np.testing.assert_array_equal(rows(values, wanted), values[wanted])


def test_blocks_cover_every_frame_once(monkeypatch):
    monkeypatch.setattr("flowsteer.datasets.replay_buffer.BLOCK_BYTES", 64)
    values = np.arange(30.0).reshape(15, 2)  # 16 bytes a frame: blocks of 4
    starts, pieces = zip(*blocks(values, 2, 15), strict=True)
    assert starts == (2, 6, 10, 14)
    np.testing.assert_array_equal(np.concatenate(pieces), values[2:])
