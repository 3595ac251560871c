import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowsteer.sim import statistics
from flowsteer.sim.statistics import bootstrap, wilson


def test_wilson_by_hand():
    # p = 0.8, n = 10, z^2 = 3.8415: centre (0.8 + 0.19207) / 1.38415 = 0.71674,
    # half width 1.95996 sqrt(0.016 + 0.0096036) / 1.38415 = 0.22657.
    assert wilson(8, 10) == pytest.approx((0.8, 0.49016, 0.94331), abs=1e-4)
    # No success leaves z^2 / (n + z^2) as the upper end.
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 3.841459 / 13.841459), abs=1e-6)


@given(trials=st.integers(1, 400), data=st.data())
def test_wilson_is_symmetric_and_holds_the_mean(trials, data):
    successes = data.draw(st.integers(0, trials))
    mean, low, high = wilson(successes, trials)
    assert 0 <= low <= mean <= high <= 1
    _, other_low, other_high = wilson(trials - successes, trials)
    assert (other_low, other_high) == pytest.approx((1 - high, 1 - low))


def test_nothing_is_claimed_without_data():
    assert all(math.isnan(value) for value in wilson(0, 0))
    assert all(math.isnan(value) for value in bootstrap(np.array([])))
    mean, low, high = bootstrap(np.array([3.0]))
    assert mean == 3.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_bootstrap_by_hand():
    assert bootstrap(np.full(7, 0.25)) == (0.25, 0.25, 0.25)
    # Two values: a resample has the mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap(np.array([0.0, 1.0])) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("block_draws", [1, 700, 1 << 20])
def test_the_size_of_the_blocks_changes_nothing(block_draws, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_DRAWS", block_draws)
    values = np.random.default_rng(1).normal(size=37)
    at_once = values[np.random.default_rng(0).integers(37, size=(10_000, 37))].mean(axis=1)
    assert bootstrap(values)[1:] == tuple(np.quantile(at_once, (0.025, 0.975)))


def test_bootstrap_needs_little_memory_for_many_values():
    tracemalloc.start()
    bootstrap(np.random.default_rng(1).normal(size=2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # all draws at once are 320 MB


def test_bootstrap_agrees_with_the_normal_interval_for_many_values():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    half = 1.96 * values.std() / 20
    mean, low, high = bootstrap(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
