"""The transition against libraries, against hand computation and against a distribution known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.paths import TO_CLEAN, LinearPath, Path, VariancePreservingPath, expand, velocity_of
from flowsteer.policies.samplers import (
    Denoise,
    Gaussian,
    chain,
    coefficients,
    dpm_solver_2m,
    heun,
    randn,
    sample,
    transition,
    uniform_grid,
)

T = 100
VP = VariancePreservingPath(train_steps=T)
FLOW = LinearPath()


def chunks(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, 4, 16, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@pytest.mark.parametrize("timestep", [0, 1, 2, 10, 50, 90, 98])
def test_eta_one_is_ddpm(ours: str, theirs: str, timestep: int) -> None:
    x_t, out = chunks(timestep)
    scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type=theirs)
    generator = torch.Generator().manual_seed(5)
    expected = scheduler.step(out, timestep, x_t, generator=generator).prev_sample
    t, s = torch.tensor((timestep + 1) / T), torch.tensor(timestep / T)
    step = transition(VP, x_t, TO_CLEAN[ours](VP, x_t, out, t), t, s, eta=1.0)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(step.mean + step.std * noise, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("timestep", [10, 50, 90])
def test_any_eta_is_ddim(ours: str, theirs: str, eta: float, timestep: int) -> None:
    x_t, out = chunks(timestep)
    scheduler = DDIMScheduler(T, beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type=theirs)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(5)
    expected = scheduler.step(out, timestep, x_t, eta=eta, generator=generator).prev_sample
    t, s = torch.tensor((timestep + 1) / T), torch.tensor((timestep - 9) / T)
    step = transition(VP, x_t, TO_CLEAN[ours](VP, x_t, out, t), t, s, eta)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(step.mean + step.std * noise, expected, atol=1e-5, rtol=1e-5)


def test_the_last_transition_returns_the_clean_chunk_without_noise() -> None:
    x_t, a_hat = chunks(3)
    for path in (VP, FLOW):
        step = transition(path, x_t, a_hat, torch.tensor(0.1), torch.tensor(0.0), eta=1.0)
        torch.testing.assert_close(step.mean, a_hat)
        assert step.std.abs().max() == 0


def test_flow_with_eta_zero_is_eulers_method() -> None:
    x_t, a_hat = chunks(4)
    t, s = torch.tensor(0.7), torch.tensor(0.6)
    euler = x_t + (s - t) * velocity_of(FLOW, x_t, a_hat, t)
    torch.testing.assert_close(transition(FLOW, x_t, a_hat, t, s, 0.0).mean, euler, atol=1e-6, rtol=1e-6)


def test_transition_by_hand() -> None:
    # alpha_t = .5, sigma_t = .5, alpha_s = .75, sigma_s = .25: (alpha_t sigma_s / (alpha_s sigma_t))^2 = 1/9.
    x_t, a_hat = torch.full((1, 1, 1), 1.0), torch.full((1, 1, 1), 0.8)
    step = transition(FLOW, x_t, a_hat, torch.tensor(0.5), torch.tensor(0.25), eta=0.5)
    var = 0.25 * 0.0625 * (1 - 1 / 9)
    eps_hat = (1.0 - 0.5 * 0.8) / 0.5
    assert step.mean.item() == pytest.approx(0.75 * 0.8 + math.sqrt(0.0625 - var) * eps_hat)
    assert step.std.item() == pytest.approx(math.sqrt(var))


def test_times_may_differ_by_row() -> None:
    x_t, a_hat = chunks(6)
    t, s = torch.tensor([0.9, 0.5, 0.3, 0.2]), torch.tensor([0.8, 0.4, 0.1, 0.0])
    rows = transition(VP, x_t, a_hat, t, s, 0.7)
    for i in range(4):
        single = transition(VP, x_t[i : i + 1], a_hat[i : i + 1], t[i], s[i], 0.7)
        torch.testing.assert_close(rows.mean[i : i + 1], single.mean)
        torch.testing.assert_close(rows.std[i].flatten(), single.std.flatten())


def test_log_prob_by_hand() -> None:
    gaussian = Gaussian(torch.tensor([1.0]), torch.tensor([2.0]))
    assert gaussian.log_prob(torch.tensor([4.0])).item() == pytest.approx(
        -0.5 * 1.5**2 - math.log(2) - 0.5 * math.log(2 * math.pi)
    )


def affine_denoise(path: Path, grid: Tensor, center: float, spread: float) -> Denoise:
    """The exact denoiser of a ~ N(center, spread^2)."""

    def denoise(x: Tensor, k: int) -> Tensor:
        alpha, sigma = path.alpha(grid[k]), path.sigma(grid[k])
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return center + gain * (x - alpha * center)

    return denoise


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_the_log_prob_of_a_chain_is_the_product_of_its_gaussians(path: Path) -> None:
    # With a Gaussian target every transition is affine-Gaussian, so (x_1, ..., x_0) given the first state is jointly
    # normal: its density from mean and covariance, built up by recursion, must equal the product over the steps.
    grid = torch.tensor([0.8, 0.5, 0.25, 0.1], dtype=torch.float64)
    path = path.double()
    denoise = affine_denoise(path, grid, 0.3, 0.5)
    x = torch.tensor([[[0.9]]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    total, states = torch.zeros(()), []
    for step, sampled in chain(coefficients(path, grid[:-1], grid[1:], 1.0), denoise, x, 1.0, generator):
        total = total + step.log_prob(sampled).sum()
        states.append(sampled.flatten())
    mean, factor = [], torch.zeros(3, 3, dtype=torch.float64)
    previous_mean, previous_row = x, torch.zeros(3, dtype=torch.float64)
    for k in range(3):
        at = [transition(path, v, denoise(v, k), grid[k], grid[k + 1], 1.0) for v in (x * 0, x * 0 + 1)]
        slope = (at[1].mean - at[0].mean).item()
        previous_mean = at[0].mean + slope * previous_mean
        previous_row = slope * previous_row
        previous_row[k] = at[0].std.item()
        factor[k] = previous_row
        mean.append(previous_mean.flatten())
    joint = torch.distributions.MultivariateNormal(torch.cat(mean), scale_tril=factor)
    torch.testing.assert_close(total, joint.log_prob(torch.cat(states)), atol=1e-5, rtol=1e-5)
    path.float()


MODES, WIDTH, WEIGHT = torch.tensor([-0.6, 0.7]), 0.1, torch.tensor([0.3, 0.7])


def two_mode_denoise(path: Path, grid: Tensor) -> Denoise:
    """The exact denoiser of a mixture of two Gaussians: posterior-weighted posterior means."""

    def denoise(x: Tensor, k: int) -> Tensor:
        alpha, sigma = path.alpha(grid[k]), path.sigma(grid[k])
        var = alpha**2 * WIDTH**2 + sigma**2
        log_weight = WEIGHT.log() - 0.5 * (x[..., None] - alpha * MODES) ** 2 / var
        posterior = MODES + alpha * WIDTH**2 / var * (x[..., None] - alpha * MODES)
        return (log_weight.softmax(-1) * posterior).sum(-1)

    return denoise


@pytest.mark.parametrize(
    ("sampler", "path", "eta", "steps"),
    [
        (sample, VP, 1.0, 100),
        (sample, VP, 0.0, 100),
        (sample, FLOW, 0.0, 100),
        (sample, FLOW, 1.0, 200),
        (sample, FLOW, 0.5, 200),
        (heun, FLOW, 0.0, 30),
        (heun, VP, 0.0, 50),
        (dpm_solver_2m, FLOW, 0.0, 40),
        (dpm_solver_2m, VP, 0.0, 40),
    ],
)
def test_samples_match_a_two_mode_distribution(
    sampler: Callable[..., Tensor], path: Path, eta: float, steps: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = uniform_grid(steps)
    x = torch.randn(20000, 1, 1, generator=generator)
    a = sampler(path, two_mode_denoise(path, grid), x, grid, eta, generator).flatten()
    mean = (WEIGHT * MODES).sum()
    var = (WEIGHT * (MODES**2 + WIDTH**2)).sum() - mean**2
    assert a.mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert a.var().item() == pytest.approx(var.item(), rel=0.05)
    # Mean and variance alone would accept a single broad mode.
    assert ((a - MODES[0]).abs() < 4 * WIDTH).float().mean().item() == pytest.approx(WEIGHT[0].item(), abs=0.02)
    assert ((a.abs()) < 0.15).float().mean() < 0.01


def flow_error(sampler: Callable[..., Tensor], steps: int) -> float:
    """Distance to the exact flow map of a Gaussian target, x_0 = center + spread * x_1 for x_1 ~ N(0, 1)."""
    grid = uniform_grid(steps)
    x = torch.linspace(-2, 2, 9).reshape(9, 1, 1)
    a = sampler(FLOW, affine_denoise(FLOW, grid, 0.3, 0.5), x, grid, 0.0)
    return (a - (0.3 + 0.5 * x)).abs().max().item()


def test_second_order_solvers_beat_euler_and_converge_faster() -> None:
    assert flow_error(sample, 20) > 2 * flow_error(heun, 20)
    assert flow_error(sample, 20) > 2 * flow_error(dpm_solver_2m, 20)
    assert flow_error(heun, 40) < 0.35 * flow_error(heun, 20)


@pytest.mark.parametrize("solver", [heun, dpm_solver_2m])
def test_deterministic_solvers_refuse_noise(solver: Callable[..., Tensor]) -> None:
    with pytest.raises(PolicyError, match=r"solver is deterministic: set policy.eta=0, got 0.5"):
        solver(FLOW, lambda x, k: x, torch.zeros(1, 1, 1), uniform_grid(2), 0.5)


def test_uniform_grid() -> None:
    assert uniform_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_grid(2, start=0.5).tolist() == [0.5, 0.25, 0.0]
    with pytest.raises(PolicyError, match=r"steps must be at least 1 and start in \(0, 1\], got steps=0 and start=1"):
        uniform_grid(0)


def test_a_generator_per_row_ignores_the_neighbours() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = randn((2, 3, 1), generators(7, 8), "cpu")
    assert torch.equal(both[1:], randn((1, 3, 1), generators(8), "cpu"))


def test_expand_aligns_with_chunks() -> None:
    assert expand(torch.ones(5), torch.ones(5, 2, 3)).shape == (5, 1, 1)
    assert expand(torch.tensor(1.0), torch.ones(5, 2, 3)).shape == (1, 1, 1)
