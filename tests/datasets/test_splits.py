from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowsteer.datasets import DataError, split_episodes
from flowsteer.datasets.splits import episode_mask


@given(st.integers(2, 60), st.floats(0.001, 0.99), st.integers(0, 5))
def test_the_parts_are_disjoint_complete_and_not_empty(episodes, fraction, seed):
    train, val = split_episodes(episodes, fraction, seed)
    assert not (train & val).any()
    assert (train | val).all()
    assert train.any()
    assert val.any()
    again = split_episodes(episodes, fraction, seed)
    np.testing.assert_array_equal(again[1], val)


def test_sizes_seeds_and_limits():
    train, val = split_episodes(206, 0.02, 42)
    assert (train.sum(), val.sum()) == (202, 4)
    assert not np.array_equal(split_episodes(206, 0.02, 43)[1], val)
    limited, same = split_episodes(206, 0.02, 42, max_train_episodes=50)
    assert limited.sum() == 50
    assert not (limited & ~train).any()
    np.testing.assert_array_equal(same, val)
    everything, nothing = split_episodes(3, 0.0, 0)
    assert (everything.sum(), nothing.sum()) == (3, 0)


@pytest.mark.parametrize("arguments", [(5, 1.0, 0), (5, -0.1, 0), (1, 0.1, 0), (0, 0.0, 0), (5, 0.1, 0, 0)])
def test_impossible_splits_are_refused(arguments):
    with pytest.raises(DataError):
        split_episodes(*arguments)


def test_episode_masks():
    assert episode_mask(None, 3).tolist() == [True] * 3
    assert episode_mask([2, 0], 3).tolist() == [True, False, True]
    assert episode_mask(np.array([False, True, False]), 3).tolist() == [False, True, False]
    with pytest.raises(DataError, match="shape"):
        episode_mask(np.ones(4, bool), 3)
    with pytest.raises(DataError, match="0 to 2, got 0 to 3"):
        episode_mask([0, 3], 3)
