"""The one transition of the project, and the samplers built from it.

A sampler is data: a falling time grid t_0 > t_1 > ... > t_K = 0 and an eta in [0, 1].

| path, eta                  | transition                        |
|----------------------------|-----------------------------------|
| variance preserving, 1     | DDPM ancestral sampling           |
| variance preserving, 0     | DDIM                              |
| linear, 0                  | Euler's method on the flow ODE    |
| linear, > 0                | a flow SDE with Gaussian steps    |

Heun and DPM-Solver++ 2M are the exceptions: deterministic, of second order, and built on the same `denoise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.paths import Path, expand, velocity_of

Denoise = Callable[[Tensor, int], Tensor]
"""x_t, index of t in the grid -> a_hat. The index, so that all that depends on t alone is computed once per grid."""


@final
class Drawn:
    """Noise that was drawn beforehand, to be taken in order: what is compiled cannot draw.

    Args:
        noise: [n, B, Tp, Da].
    """

    def __init__(self, noise: Tensor) -> None:
        self._left = list(noise.unbind())

    def take(self) -> Tensor:
        """The next [B, Tp, Da]."""
        return self._left.pop(0)


Generators = torch.Generator | Sequence[torch.Generator] | Drawn | None
"""One generator for a batch, or one for each of its rows (an episode's noise then ignores its neighbours)."""


class Gaussian(NamedTuple):
    """A Gaussian with independent elements: mean [B, Tp, Da], std broadcastable to it."""

    mean: Tensor
    std: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Elementwise log-density of `x`; the caller reduces."""
        z = (x - self.mean) / self.std
        return -0.5 * z * z - self.std.log() - 0.5 * math.log(2 * math.pi)


def randn(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal float32 [B, ...] drawn on the generator's own device, from one generator or one per row."""
    if isinstance(generator, Drawn):
        return generator.take()
    if isinstance(generator, Sequence):
        return torch.stack([randn(shape[1:], row, device) for row in generator])
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


def start_noise(
    noise: Tensor | None, shape: Sequence[int], generator: Generators, device: torch.device | str
) -> Tensor:
    """The noise [B, Tp, Da] that a chunk starts from: what is given, or drawn by `randn`.

    Raises:
        PolicyError: what is given has another shape.
    """
    if noise is None:
        return randn(shape, generator, device)
    if tuple(noise.shape) != tuple(shape):
        raise PolicyError(f"noise must have shape {list(shape)}, got {list(noise.shape)}")
    return noise


def uniform_grid(steps: int, start: float = 1.0) -> Tensor:
    """K + 1 equally spaced times from `start` down to 0."""
    if steps < 1 or not 0 < start <= 1:
        raise PolicyError(f"steps must be at least 1 and start in (0, 1], got steps={steps} and start={start:g}")
    # Rounded through float64 so that each time is the float32 nearest to k * start / K.
    return (torch.linspace(start, 0.0, steps + 1, dtype=torch.float64)).float()


Coefficients = tuple[Tensor, Tensor, Tensor]
"""c_a, c_x, std, see `coefficients`."""


def coefficients(path: Path, t: Tensor, s: Tensor, eta: float) -> Coefficients:
    """The step from times t to s < t, each a scalar or [N], as x_s ~ N(c_a a_hat + c_x x_t, std^2): c_a, c_x, std.

    var  = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)
    mean = alpha_s a_hat + sqrt(sigma_s^2 - var) eps_hat, where eps_hat = (x_t - alpha_t a_hat) / sigma_t
    """
    alpha_t, sigma_t, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    var = eta**2 * sigma_s**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
    c_x = (sigma_s**2 - var).clamp(min=0).sqrt() / sigma_t
    return alpha_s - c_x * alpha_t, c_x, var.clamp(min=0).sqrt()


def transition(path: Path, x_t: Tensor, a_hat: Tensor, t: Tensor, s: Tensor, eta: float) -> Gaussian:
    """The step from time t to s < t as a Gaussian over x_s, see `coefficients`.

    Args:
        path: the path that x_t lies on.
        x_t: [B, Tp, Da].
        a_hat: expected clean chunk [B, Tp, Da].
        t: current time, scalar or [B].
        s: next time, like `t`.
        eta: 0 deterministic, 1 the posterior variance of DDPM.
    """
    c_a, c_x, std = (expand(coefficient, x_t) for coefficient in coefficients(path, t, s, eta))
    return Gaussian(c_a * a_hat + c_x * x_t, std)


def chain(
    known: Coefficients, denoise: Denoise, x: Tensor, eta: float, generator: Generators = None
) -> Iterator[tuple[Gaussian, Tensor]]:
    """Yield (distribution, sample) of each step, whose coefficients are `known`; the last sample is the clean chunk."""
    c_a, c_x, std = known
    for k in range(len(c_a)):
        step = Gaussian(c_a[k] * denoise(x, k) + c_x[k] * x, std[k])
        x = step.mean if eta == 0 else step.mean + step.std * randn(x.shape, generator, x.device)
        yield step, x


Sampler = Callable[[Path, Denoise, Tensor, Tensor, float, Generators], Tensor]
"""path, denoise, x at grid[0] [B, Tp, Da], grid [K + 1], eta, generator -> clean chunk [B, Tp, Da]."""


def follow(known: Coefficients, denoise: Denoise, x: Tensor, eta: float, generator: Generators = None) -> Tensor:
    """The clean chunk at the end of a `chain`."""
    for _, sampled in chain(known, denoise, x, eta, generator):
        x = sampled
    return x


def sample(path: Path, denoise: Denoise, x: Tensor, grid: Tensor, eta: float, generator: Generators = None) -> Tensor:
    """Run the transitions of the whole grid."""
    return follow(coefficients(path, grid[:-1], grid[1:], eta), denoise, x, eta, generator)


def _refuse_noise(name: str, eta: float) -> None:
    if eta != 0:
        raise PolicyError(f"the {name} solver is deterministic: set policy.eta=0, got {eta}")


def heun(path: Path, denoise: Denoise, x: Tensor, grid: Tensor, eta: float, generator: Generators = None) -> Tensor:
    """Heun's method on the probability-flow ODE; 2K - 1 evaluations (the last step is Euler's, sigma being 0)."""
    _refuse_noise("heun", eta)
    for k in range(len(grid) - 2):
        t, s = grid[k], grid[k + 1]
        slope = velocity_of(path, x, denoise(x, k), t)
        guess = x + (s - t) * slope
        x = x + (s - t) * 0.5 * (slope + velocity_of(path, guess, denoise(guess, k + 1), s))
    last = len(grid) - 2
    return transition(path, x, denoise(x, last), grid[last], grid[last + 1], 0.0).mean


def dpm_solver_2m(
    path: Path, denoise: Denoise, x: Tensor, grid: Tensor, eta: float, generator: Generators = None
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): multistep in the half log-SNR; K evaluations.

    The first and the last step are of first order: there is no earlier a_hat, and the log-SNR of t = 0 is infinite.
    """
    _refuse_noise("dpm_solver_2m", eta)
    log_snr = path.alpha(grid).log() - path.sigma(grid).log()
    previous = x
    for k in range(len(grid) - 1):
        a_hat = denoise(x, k)
        blended = a_hat
        if 0 < k < len(grid) - 2:
            r = (log_snr[k] - log_snr[k - 1]) / (log_snr[k + 1] - log_snr[k])
            blended = a_hat + (a_hat - previous) / (2 * r)
        x = _exponential_step(path, x, blended, grid[k], grid[k + 1])
        previous = a_hat
    return x


def _exponential_step(path: Path, x: Tensor, a_hat: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s = sigma_s / sigma_t x_t + (alpha_s - alpha_t sigma_s / sigma_t) a_hat: the eta = 0 transition, rearranged."""
    ratio = path.sigma(s) / path.sigma(t)
    return ratio * x + (path.alpha(s) - path.alpha(t) * ratio) * a_hat
