"""Paths and predictions: identities that hold for any chunk, and tables of a library."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.paths import (
    TARGET,
    TO_CLEAN,
    LinearPath,
    Path,
    VariancePreservingPath,
    cosine_betas,
    eps_of,
    linear_betas,
    velocity_of,
)

PATHS: dict[str, Path] = {
    "cosine": VariancePreservingPath(cosine_betas, 100),
    "linear_betas": VariancePreservingPath(linear_betas, 50),
    "flow": LinearPath(),
}
times = st.floats(0.02, 0.95)


@pytest.mark.parametrize("name", PATHS)
def test_path_starts_clean(name: str) -> None:
    zero = torch.zeros(1)
    assert PATHS[name].alpha(zero).item() == 1.0
    assert PATHS[name].sigma(zero).item() == 0.0


@pytest.mark.parametrize("name", PATHS)
def test_signal_falls_and_noise_rises(name: str) -> None:
    t = torch.linspace(0, 1, 500)
    assert (PATHS[name].alpha(t).diff() < 0).all()
    # Near t = 1 a float32 sigma has nothing left to gain.
    assert (PATHS[name].sigma(t).diff() >= 0).all()


def test_linear_path_by_hand() -> None:
    a, eps = torch.tensor([[[2.0]]]), torch.tensor([[[-1.0]]])
    assert LinearPath().noisy(a, eps, torch.tensor([0.25])).item() == pytest.approx(0.75 * 2 - 0.25)


@pytest.mark.parametrize(("schedule", "betas"), [("squaredcos_cap_v2", cosine_betas), ("linear", linear_betas)])
@pytest.mark.parametrize("steps", [50, 100, 1000])
def test_knots_equal_the_tables_of_diffusers(schedule: str, betas, steps: int) -> None:  # type: ignore[no-untyped-def]
    scale = 1000 / steps
    table = DDPMScheduler(steps, 1e-4 * scale, 0.02 * scale, schedule).alphas_cumprod
    path = VariancePreservingPath(betas, steps)
    t = (torch.arange(steps) + 1) / steps
    torch.testing.assert_close(path.alpha(t), table.sqrt(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(path.sigma(t), (1 - table).sqrt(), atol=1e-5, rtol=1e-5)


@given(times, st.sampled_from(["cosine", "linear_betas"]))
def test_variance_is_preserved(t: float, name: str) -> None:
    time = torch.tensor([t])
    assert PATHS[name].alpha(time).square() + PATHS[name].sigma(time).square() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_match_differences(name: str) -> None:
    t, h = torch.tensor([0.113, 0.317, 0.555, 0.871], dtype=torch.float64), 1e-4
    path = PATHS[name].double()
    d_alpha, d_sigma = path.derivatives(t)
    torch.testing.assert_close(d_alpha, (path.alpha(t + h) - path.alpha(t - h)) / (2 * h), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d_sigma, (path.sigma(t + h) - path.sigma(t - h)) / (2 * h), atol=1e-4, rtol=1e-4)
    PATHS[name].float()


@pytest.mark.parametrize("prediction", TO_CLEAN)
@given(t=times, seed=st.integers(0, 1000), name=st.sampled_from(list(PATHS)))
def test_a_perfect_prediction_gives_back_the_chunk(prediction: str, t: float, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, eps = torch.randn(2, 3, 4, 2, generator=generator)
    path, time = PATHS[name], torch.full((3,), t)
    x_t = path.noisy(a, eps, time)
    a_hat = TO_CLEAN[prediction](path, x_t, TARGET[prediction](path, a, eps, time), time)
    torch.testing.assert_close(a_hat, a, atol=2e-3, rtol=1e-3)


@given(t=times, name=st.sampled_from(list(PATHS)))
def test_eps_and_velocity_follow_from_the_clean_chunk(t: float, name: str) -> None:
    a, eps = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(1))
    path, time = PATHS[name], torch.full((3,), t)
    x_t = path.noisy(a, eps, time)
    torch.testing.assert_close(eps_of(path, x_t, a, time), eps, atol=1e-3, rtol=1e-3)
    expected = TARGET["velocity"](path, a, eps, time)
    torch.testing.assert_close(velocity_of(path, x_t, a, time), expected, atol=5e-3, rtol=5e-3)


def test_flow_velocity_by_hand() -> None:
    a, eps, t = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 5.0), torch.tensor([0.4])
    assert TARGET["velocity"](LinearPath(), a, eps, t).item() == 2.0
    assert TARGET["v"](LinearPath(), a, eps, t).item() == pytest.approx(0.6 * 5 - 0.4 * 3)


def test_cosine_betas_by_hand() -> None:
    first = 1 - math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert cosine_betas(2).tolist() == pytest.approx([first, 0.999])


def test_a_path_needs_a_step() -> None:
    with pytest.raises(PolicyError, match="train_steps must be at least 1, got 0"):
        VariancePreservingPath(train_steps=0)
