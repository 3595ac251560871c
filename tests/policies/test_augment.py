from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowsteer.policies.encoders.augment import Augment, crop, jitter
from flowsteer.policies.errors import PolicyError


def images(batch: int, steps: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, steps, height, width, channels), dtype=torch.uint8, generator=generator)


def scaled(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W, C] -> [..., C, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def test_crop_equals_slices() -> None:
    batch = images(4, 2, 7, 9)
    top, left = torch.tensor([0, 3, 1, 2]), torch.tensor([4, 0, 2, 3])
    windows = crop(batch, top, left, 4, 5)
    assert windows.dtype == torch.uint8
    for i in range(4):
        expected = batch[i, :, top[i] : top[i] + 4, left[i] : left[i] + 5].permute(0, 3, 1, 2)
        assert torch.equal(windows[i], expected)


def test_evaluation_takes_the_centre() -> None:
    batch = images(3, 2, 10, 20)
    augment = Augment(crop=0.6, brightness=0.5, contrast=0.5, saturation=0.5).eval()
    torch.testing.assert_close(augment(batch), scaled(batch[:, :, 2:8, 4:16]))
    assert torch.equal(augment(batch), augment(batch))


def test_the_whole_range_of_values_becomes_minus_one_to_one() -> None:
    batch = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1, 1)
    assert Augment()(batch).flatten().tolist() == [-1, 1]


def test_training_without_options_changes_nothing() -> None:
    batch = images(3, 2, 5, 6)
    torch.testing.assert_close(Augment()(batch), scaled(batch))


def test_random_crops_reach_every_window() -> None:
    batch = images(1, 1, 4, 4).expand(100, 2, 4, 4, 3)
    torch.manual_seed(0)
    out = Augment(crop=0.75)(batch)
    offsets = [(top, left) for top in (0, 1) for left in (0, 1)]
    windows = [scaled(batch[0, :, top : top + 3, left : left + 3]) for top, left in offsets]
    taken = torch.tensor([[torch.allclose(sample, window) for window in windows] for sample in out])
    assert taken.sum(dim=1).tolist() == [1] * 100
    assert taken.sum(dim=0).min() >= 10


def test_frames_of_a_sample_share_crop_and_colours() -> None:
    frame = images(16, 1, 8, 8)
    out = Augment(crop=0.5, brightness=0.3, contrast=0.3, saturation=0.3)(frame.expand(16, 3, 8, 8, 3))
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


def test_samples_differ_in_crop_and_colours() -> None:
    batch = images(1, 1, 8, 8).expand(8, 1, 8, 8, 3)
    for augment in (Augment(crop=0.5), Augment(brightness=0.3), Augment(contrast=0.3), Augment(saturation=0.3)):
        torch.manual_seed(0)
        assert len({tuple(sample.flatten().tolist()) for sample in augment(batch)}) >= 5


def test_draws_come_from_the_global_generator() -> None:
    batch, augment = images(8, 1, 8, 8), Augment(crop=0.5, brightness=0.3)
    state = torch.get_rng_state()
    first, other = augment(batch), augment(batch)
    torch.set_rng_state(state)
    assert torch.equal(augment(batch), first)
    assert not torch.equal(first, other)


def test_brightness_stays_within_its_bounds() -> None:
    batch = torch.full((500, 1, 1, 1, 3), 100, dtype=torch.uint8)
    values = (Augment(brightness=0.2)(batch) + 1) * 127.5
    assert values.min() >= 79.99
    assert values.max() <= 120.01
    assert values.std() > 10


def colour(*values: float) -> Tensor:
    """One sample of one frame of one pixel."""
    return torch.tensor(values).reshape(1, 1, 3, 1, 1)


def jittered(pixels: Tensor, brightness: float = 1, contrast: float = 1, saturation: float = 1) -> list[float]:
    factors = (torch.full((len(pixels),), factor) for factor in (brightness, contrast, saturation))
    return [round(value, 4) for value in jitter(pixels, *factors).flatten().tolist()]


def test_jitter_by_hand() -> None:
    pixel = colour(1.0, 0.5, 0.0)
    grey = 0.299 + 0.587 * 0.5
    assert jittered(pixel) == [1.0, 0.5, 0.0]
    assert jittered(pixel, brightness=0.5) == [0.5, 0.25, 0.0]
    assert jittered(pixel, brightness=3) == [1.0, 1.0, 0.0]
    assert jittered(pixel, saturation=0) == [round(grey, 4)] * 3
    assert jittered(pixel, contrast=0) == [round(grey, 4)] * 3
    # Black and white have the mean grey 0.5: half the contrast leaves 0.25 and 0.75, half the brightness halves them.
    pair = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 1)
    assert jittered(pair, contrast=0.5) == [0.25] * 3 + [0.75] * 3
    assert jittered(pair, brightness=0.5, contrast=0.5) == [0.125] * 3 + [0.375] * 3


def test_saturation_leaves_a_single_channel_alone() -> None:
    depth = torch.rand(2, 1, 1, 4, 4)
    ones = torch.ones(2)
    torch.testing.assert_close(jitter(depth, ones, ones, torch.zeros(2)), depth)


factors = st.floats(0.0, 2.0)


@settings(deadline=None, max_examples=50)
@given(brightness=factors, contrast=factors, saturation=factors, seed=st.integers(0, 100))
def test_jitter_equals_its_three_steps(brightness: float, contrast: float, saturation: float, seed: int) -> None:
    x = torch.rand(1, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    step = brightness * x
    step = (mean := (step * weights).sum(2).mean()) + contrast * (step - mean)
    step = (grey := (step * weights).sum(2, keepdim=True)) + saturation * (step - grey)
    out = jitter(x, *torch.tensor([brightness, contrast, saturation], dtype=torch.float64).view(3, 1))
    torch.testing.assert_close(out, step.clamp(0, 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"crop": 0.0}, r"crop must be in \(0, 1\], got 0"),
    ({"crop": 1.5}, "crop must be in"),
    ({"brightness": 1.0}, r"brightness must be in \[0, 1\), got 1"),
    ({"saturation": -0.1}, "saturation must be in"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Augment(**options)
