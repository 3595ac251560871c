"""Means with 95 % intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
RESAMPLES = 10_000
BLOCK_DRAWS = 1 << 20


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval; NaN where there is too little data to say."""

    mean: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Interval:
    """The share of successes with Wilson's score interval (1927), which stays in [0, 1] and is sound at both ends."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan)
    share, z2 = successes / trials, Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # Rounding alone could push an end past 0, 1 or the share itself.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def bootstrap(values: NDArray[np.float64]) -> Interval:
    """The mean of values [n] with its percentile bootstrap interval; the same values give the same interval."""
    if len(values) < 2:
        return Interval(float(values[0]) if len(values) else math.nan, math.nan, math.nan)
    low, high = np.quantile(_resampled_means(values), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def _resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[RESAMPLES], drawn in blocks: all draws at once would take 160 kB per value."""
    generator, means = np.random.default_rng(0), np.empty(RESAMPLES)
    step = max(1, BLOCK_DRAWS // len(values))
    for block in np.split(means, range(step, RESAMPLES, step)):
        block[:] = values[generator.integers(len(values), size=(len(block), len(values)))].mean(axis=1)
    return means
