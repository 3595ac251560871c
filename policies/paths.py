"""Gaussian paths x_t = alpha(t) a + sigma(t) eps, t in [0, 1], t = 0 clean and t = 1 noise, and what they imply.

`a` clean chunk, `eps` standard normal noise, `x_t` noisy chunk. Times are tensors of any shape; `alpha` and `sigma`
keep that shape, and `expand` aligns them with chunks [B, Tp, Da].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.spec import configurable


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append axes to a coefficient [B] (or scalar) until it broadcasts against `x` [B, ...]."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


@configurable
class Path(nn.Module, ABC):
    """The pair alpha(t), sigma(t). alpha falls from 1, sigma rises from 0."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at t."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt at t."""

    def noisy(self, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of clean chunks `a` [B, ...] at times `t` [B]."""
        return expand(self.alpha(t), a) * a + expand(self.sigma(t), a) * eps


@final
class LinearPath(Path):
    """alpha = 1 - t, sigma = t: flow matching and rectified flow (Lipman et al. 2023, Liu et al. 2023)."""

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return 1.0 - t

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        return t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return -torch.ones_like(t), torch.ones_like(t)


@configurable
def cosine_betas(train_steps: int) -> Tensor:
    """Squared-cosine betas capped at 0.999 [train_steps], float64 (Nichol & Dhariwal 2021)."""

    def alpha_bar(t: Tensor) -> Tensor:
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = torch.arange(train_steps + 1, dtype=torch.float64) / train_steps
    return (1 - alpha_bar(t[1:]) / alpha_bar(t[:-1])).clamp(max=0.999)


@configurable
def linear_betas(train_steps: int) -> Tensor:
    """DDPM's betas, 1e-4 to 0.02 at 1000 steps, rescaled to `train_steps` [train_steps] (Ho et al. 2020)."""
    scale = 1000 / train_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, train_steps, dtype=torch.float64).clamp(max=0.999)


@final
class VariancePreservingPath(Path):
    """alpha^2 + sigma^2 = 1 with the discrete betas of DDPM read as a piecewise constant rate.

    log alpha^2 is linear between the knots i / T, so the path is defined for every t and equals the tables of
    `diffusers` at t = (timestep + 1) / T; t = 0 is the clean chunk.

    Args:
        betas: the schedule, a function of the number of steps.
        train_steps: T, the number of knots.
    """

    def __init__(self, betas: Callable[[int], Tensor] = cosine_betas, train_steps: int = 100) -> None:
        super().__init__()
        if train_steps < 1:
            raise PolicyError(f"train_steps must be at least 1, got {train_steps}")
        self.betas, self.train_steps = betas, train_steps
        steps = torch.log1p(-betas(train_steps))
        log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        # Tables follow from the config, so they are not part of the weights. Slopes per unit of t.
        self.register_buffer("log_alpha_bar", log_alpha_bar.float(), persistent=False)
        self.register_buffer("slope", (steps * train_steps).float(), persistent=False)

    log_alpha_bar: Tensor
    slope: Tensor

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        # A hair above a knot must not fall below it: 0.3 * 10 is 3.0000000000000004 but 0.29999998 * 10 is 2.9999998.
        knot = (t * self.train_steps + 1e-4).floor().clamp(0, self.train_steps - 1).long()
        return _at(self.log_alpha_bar, knot) + _at(self.slope, knot) * (t - knot / self.train_steps)

    def alpha(self, t: Tensor) -> Tensor:  # noqa: D102
        return (0.5 * self._log_alpha_bar(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:  # noqa: D102
        # expm1 keeps the digits of a small sigma, where 1 - alpha^2 would cancel.
        return (-torch.expm1(self._log_alpha_bar(t))).clamp(min=0).sqrt()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        knot = (t * self.train_steps - 1e-4).ceil().clamp(1, self.train_steps).long() - 1
        alpha, sigma = self.alpha(t), self.sigma(t)
        d_alpha = 0.5 * alpha * _at(self.slope, knot)
        return d_alpha, -alpha * d_alpha / sigma


def _at(table: Tensor, knot: Tensor) -> Tensor:
    # Not table[knot]: of a knot without dimensions, torch.compile makes a number that it does not know.
    return table.index_select(0, knot.flatten()).view_as(knot)


Prediction = Callable[[Path, Tensor, Tensor, Tensor], Tensor]


def to_clean_from_eps(path: Path, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """a_hat of a network that predicts eps."""
    return (x_t - expand(path.sigma(t), x_t) * out) / expand(path.alpha(t), x_t)


def to_clean_from_x0(path: Path, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """a_hat of a network that predicts the clean chunk."""
    return out


def to_clean_from_v(path: Path, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """a_hat of a network that predicts v = alpha eps - sigma a (Salimans & Ho 2022)."""
    alpha, sigma = expand(path.alpha(t), x_t), expand(path.sigma(t), x_t)
    return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)


def to_clean_from_velocity(path: Path, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """a_hat of a network that predicts the velocity dx/dt = alpha' a + sigma' eps."""
    alpha, sigma = expand(path.alpha(t), x_t), expand(path.sigma(t), x_t)
    d_alpha, d_sigma = (expand(d, x_t) for d in path.derivatives(t))
    return (d_sigma * x_t - sigma * out) / (alpha * d_sigma - sigma * d_alpha)


def target_eps(path: Path, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network that predicts eps is trained on."""
    return eps


def target_x0(path: Path, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network that predicts the clean chunk is trained on."""
    return a


def target_v(path: Path, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network that predicts v is trained on."""
    return expand(path.alpha(t), a) * eps - expand(path.sigma(t), a) * a


def target_velocity(path: Path, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network that predicts the velocity is trained on."""
    d_alpha, d_sigma = (expand(d, a) for d in path.derivatives(t))
    return d_alpha * a + d_sigma * eps


TO_CLEAN: dict[str, Prediction] = {
    "eps": to_clean_from_eps,
    "x0": to_clean_from_x0,
    "v": to_clean_from_v,
    "velocity": to_clean_from_velocity,
}
TARGET: dict[str, Prediction] = {"eps": target_eps, "x0": target_x0, "v": target_v, "velocity": target_velocity}


def eps_of(path: Path, x_t: Tensor, a_hat: Tensor, t: Tensor) -> Tensor:
    """eps_hat = (x_t - alpha a_hat) / sigma, for t > 0."""
    return (x_t - expand(path.alpha(t), x_t) * a_hat) / expand(path.sigma(t), x_t)


def velocity_of(path: Path, x_t: Tensor, a_hat: Tensor, t: Tensor) -> Tensor:
    """Velocity of the probability-flow ODE, dx/dt = alpha' a_hat + sigma' eps_hat, for t > 0."""
    d_alpha, d_sigma = (expand(d, x_t) for d in path.derivatives(t))
    return d_alpha * a_hat + d_sigma * eps_of(path, x_t, a_hat, t)
