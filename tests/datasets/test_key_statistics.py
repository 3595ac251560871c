from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowsteer.datasets import DataError, ReplayBuffer, statistics


def test_the_statistics_of_a_hand_made_key():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [100.0, 7.0]], np.float32)
    buffer = ReplayBuffer({"x": values}, np.array([3, 4]))
    found = statistics(buffer, ["x"], episodes=np.array([True, False]))["x"]
    assert found.min.tolist() == [1, 5]
    assert found.max.tolist() == [3, 5]
    assert found.mean.tolist() == [2, 5]
    assert found.std.tolist() == pytest.approx([np.sqrt(2 / 3), 0])
    assert found.count == 3
    assert all(array.dtype == np.float64 for array in (found.min, found.max, found.mean, found.std))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 100), st.data())
def test_blocks_give_the_statistics_of_the_whole(lengths, seed, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    mask[0] |= not mask.any()
    values = (1e3 + np.random.default_rng(seed).normal(size=(sum(lengths), 3))).astype(np.float32)
    buffer = ReplayBuffer({"x": values}, np.cumsum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowsteer.datasets.replay_buffer.BLOCK_BYTES", 24)
        found = statistics(buffer, ["x"], mask)["x"]
    chosen = values[np.repeat(mask, lengths)].astype(np.float64)
    np.testing.assert_array_equal(found.min, chosen.min(axis=0))
    np.testing.assert_array_equal(found.max, chosen.max(axis=0))
    np.testing.assert_allclose(found.mean, chosen.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.std, chosen.std(axis=0), rtol=1e-9, atol=1e-12)
    assert found.count == len(chosen)


def test_a_constant_channel_is_exactly_constant():
    buffer = ReplayBuffer({"x": np.full((999, 1), 0.1)}, np.array([999]))
    found = statistics(buffer, ["x"])["x"]
    assert found.mean[0] == found.min[0] == found.max[0] == 0.1
    assert found.std[0] == 0.0


def test_images_have_statistics_per_channel():
    images = np.zeros((4, 9, 8, 3), np.uint8)
    images[:2, ..., 0] = 200
    found = statistics(ReplayBuffer({"img": images}, np.array([4])), ["img"])["img"]
    assert found.mean.tolist() == [100, 0, 0]
    assert found.std.tolist() == [100, 0, 0]
    assert found.count == 4


def test_one_number_per_frame_is_one_channel_and_other_shapes_keep_theirs():
    buffer = ReplayBuffer({"r": np.arange(4.0), "p": np.zeros((4, 9, 2))}, np.array([4]))
    found = statistics(buffer, ["r", "p"])
    assert all(getattr(found["r"], name).shape == (1,) for name in ("min", "max", "mean", "std"))
    assert (found["r"].min[0], found["r"].max[0], found["r"].mean[0], found["r"].count) == (0, 3, 1.5, 4)
    assert found["r"].std[0] == pytest.approx(np.sqrt(1.25))
    assert found["p"].mean.shape == (9, 2)


def test_bad_values_are_refused_only_in_the_chosen_episodes():
    values = np.zeros((6, 1))
    values[4] = np.nan
    buffer = ReplayBuffer({"x": values}, np.array([3, 6]), {"source": "demo"}, check_finite=False)
    assert statistics(buffer, ["x"], [0])["x"].count == 3
    with pytest.raises(DataError, match=r"demo: key 'x' .* at frame 4 \(episode 1\)"):
        statistics(buffer, ["x"])
    with pytest.raises(DataError, match="no key 'y'"):
        statistics(buffer, ["y"])
