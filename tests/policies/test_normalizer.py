"""The normaliser: hand-computed maps, round trips, and refusals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.normalizer import Normalizer

F64 = NDArray[np.float64]


@dataclass
class Stats:
    min: F64
    max: F64
    mean: F64
    std: F64


def stats(values: F64) -> Stats:
    return Stats(values.min(0), values.max(0), values.mean(0), values.std(0))


def fitted(kind: str, values: F64) -> Normalizer:
    normalizer = Normalizer({"x": values.shape[1]})
    normalizer.fit({"x": stats(values)}, {"x": kind})
    return normalizer


VALUES = np.array([[0.0, 5.0], [10.0, 5.0], [2.0, 5.0]])


def test_min_max_by_hand() -> None:
    out = fitted("min_max", VALUES).normalize("x", torch.tensor(VALUES).float())
    # The second channel is constant: shifted to 0, not divided by 0.
    assert out.tolist() == [[-1.0, 0.0], [1.0, 0.0], [pytest.approx(-0.6), 0.0]]


def test_mean_std_by_hand() -> None:
    out = fitted("mean_std", VALUES).normalize("x", torch.tensor([[14.0, 6.0]]))
    mean, std = 4.0, np.sqrt((16 + 36 + 4) / 3)
    torch.testing.assert_close(out, torch.tensor([[(14 - mean) / std, 1.0]]).float())


def test_identity_changes_nothing() -> None:
    x = torch.tensor([[3.0, -7.0]])
    assert torch.equal(fitted("identity", VALUES).normalize("x", x), x)


def test_the_two_values_of_a_discrete_channel_are_levels_of_whatever_kind() -> None:
    values = np.array([[1.0, 0.08, 3.0], [2.0, 0.0, 3.0], [4.0, 0.08, 3.0]])
    normalizer = fitted("mean_std", values)
    before = normalizer.normalize("x", torch.tensor(values).float())
    normalizer.fit_levels({"x": stats(values)}, "x", [1, 2], 0.5)
    out = normalizer.normalize("x", torch.tensor(values).float())
    torch.testing.assert_close(out[:, 1], torch.tensor([0.5, -0.5, 0.5]))
    assert torch.equal(out[:, 0], before[:, 0])
    # What never changes is in the middle of two levels that mean nearly the same.
    assert out[:, 2].tolist() == [0.0, 0.0, 0.0]
    levels = normalizer.unnormalize("x", torch.tensor([[0.0, 0.0, -0.5], [0.0, 0.0, 0.5]]))[:, 2]
    torch.testing.assert_close(levels, torch.tensor([2.997, 3.003]))


@pytest.mark.parametrize("kind", ["min_max", "mean_std", "identity"])
@given(values=hnp.arrays(np.float64, (7, 3), elements=st.floats(-1000, 1000, width=32)))
def test_round_trip(kind: str, values: F64) -> None:
    normalizer = fitted(kind, values)
    x = torch.tensor(values).float()
    torch.testing.assert_close(normalizer.unnormalize("x", normalizer.normalize("x", x)), x, atol=2e-3, rtol=1e-4)


@given(values=hnp.arrays(np.float64, (7, 3), elements=st.floats(-1000, 1000, width=32)))
def test_min_max_stays_in_range(values: F64) -> None:
    assert fitted("min_max", values).normalize("x", torch.tensor(values).float()).abs().max() <= 1 + 1e-3


def test_channels_over_several_axes() -> None:
    normalizer = Normalizer({"points": 4})
    values = np.arange(8.0).reshape(2, 4)
    normalizer.fit({"points": stats(values)}, {})
    out = normalizer.normalize("points", torch.tensor(values).float().reshape(2, 1, 2, 2))
    assert out.flatten().tolist() == [-1.0] * 4 + [1.0] * 4


def test_missing_key() -> None:
    with pytest.raises(PolicyError, match=r"no statistics for key 'x'; the data set offers \['y'\]"):
        Normalizer({"x": 2}).fit({"y": stats(VALUES)}, {})
    with pytest.raises(PolicyError, match=r"the normaliser has no key 'y'; it knows \['x'\]"):
        fitted("min_max", VALUES).normalize("y", torch.zeros(2))


def test_wrong_width() -> None:
    with pytest.raises(PolicyError, match="key 'x' has 3 channels, its min has 2"):
        Normalizer({"x": 3}).fit({"x": stats(VALUES)}, {})
    with pytest.raises(PolicyError, match=r"key 'x' has 2 channels, got an array of shape \(5, 3\)"):
        fitted("min_max", VALUES).normalize("x", torch.zeros(5, 3))
    with pytest.raises(PolicyError, match=r"key 'x' has 1 channels, got an array of shape \(2, 3, 7\)"):
        fitted("min_max", VALUES[:, :1]).normalize("x", torch.zeros(2, 3, 7))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_that_are_not_finite(bad: float) -> None:
    values = VALUES.copy()
    values[1, 0] = bad
    with pytest.raises(PolicyError, match="of key 'x' is not finite: look at it with `flowsteer data inspect`"):
        fitted("min_max", values)


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(PolicyError, match="the normaliser of key 'x' 'minmax' is unknown; nearest: min_max"):
        fitted("minmax", VALUES)


def test_an_unfitted_normaliser_never_passes_values_through() -> None:
    normalizer = Normalizer({"x": 1})
    assert torch.isnan(normalizer.normalize("x", torch.ones(1, 1))).all()
    with pytest.raises(PolicyError, match="scale:x is not finite: fit it on data or load a checkpoint"):
        normalizer.check()
