"""Policies that speak `denoise`: diffusion and flow differ in their path and in what the network predicts."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from flowsteer.policies.choices import pick
from flowsteer.policies.encoders.base import EncoderFactory
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Features, NetworkFactory
from flowsteer.policies.paths import (
    TARGET,
    TO_CLEAN,
    LinearPath,
    Path,
    VariancePreservingPath,
    cosine_betas,
    linear_betas,
)
from flowsteer.policies.policy import ACTION, Draws, Loss, Policy
from flowsteer.policies.samplers import (
    Coefficients,
    Generators,
    Sampler,
    coefficients,
    dpm_solver_2m,
    follow,
    heun,
    sample,
    start_noise,
    uniform_grid,
)
from flowsteer.policies.spec import PolicySpec

SOLVERS: dict[str, Sampler] = {"transition": sample, "heun": heun, "dpm_solver_2m": dpm_solver_2m}
BETAS: dict[str, Callable[[int], Tensor]] = {"cosine": cosine_betas, "linear": linear_betas}


def uniform_times(u: Tensor) -> Tensor:
    """Every time equally often."""
    return u


def logit_normal_times(u: Tensor) -> Tensor:
    """Most weight on the middle of the path (Esser et al. 2024), mean 0 and scale 1."""
    normal: Tensor = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    return normal.sigmoid()


def noisy_times(u: Tensor) -> Tensor:
    """Beta(1.5, 1) towards the noise (pi0, Black et al. 2024): t = u^(2/3)."""
    return u ** (2 / 3)


TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": uniform_times,
    "logit_normal": logit_normal_times,
    "noisy": noisy_times,
}


class Settled(NamedTuple):
    """What is known of a time of the grid once the weights are: its features, and a_hat = of_x x_t + of_out out."""

    time: Features
    of_x: Tensor
    of_out: Tensor


class DenoisingPolicy(Policy, ABC):
    """A network on a Gaussian path, read as `denoise(x_t, t, cond) -> a_hat`.

    Args:
        spec: see `Policy`.
        encoder: see `Policy`.
        network: builds the network from Da, Tp, To, F.
        path: alpha(t), sigma(t).
        prediction: what the network outputs: "eps", "x0", "v" or "velocity".
        times: distribution of training times: "uniform", "logit_normal" or "noisy".
        min_time: smallest time of training; `steps` may not lead below it.
        steps: K, equal steps of the time grid from `start` to 0.
        start: first time of the grid, in (0, 1].
        eta: 0 for a deterministic map from noise to chunk, 1 for DDPM's posterior noise.
        solver: "transition" (one evaluation a step), "heun" or "dpm_solver_2m".
        clip: bound of |a_hat| while sampling, in normalised units; None for no bound. Only "min_max" tells what range
            the actions fill, so any other normaliser of the action needs None.
        normalizers, relative_to: see `Policy`.

    Raises:
        PolicyError: an option is unknown or out of its range, or two of them do not go together.
    """

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        network: NetworkFactory,
        path: Path,
        prediction: str,
        times: str,
        min_time: float,
        steps: int,
        start: float,
        eta: float,
        solver: str,
        clip: float | None,
        normalizers: Mapping[str, str] | None,
        relative_to: str | None,
    ) -> None:
        super().__init__(spec, encoder, normalizers, relative_to)
        if not 0 <= eta <= 1 or (clip is not None and not clip > 0):
            raise PolicyError(f"policy.eta must be in [0, 1] and policy.clip positive or null, got {eta} and {clip}")
        kind = self.normalizers.get(ACTION, "min_max")
        if clip is not None and kind != "min_max":
            raise PolicyError(
                f"policy.clip={clip:g} is for actions in [-1, 1], but the action is normalised by '{kind}': "
                "set policy.clip=null"
            )
        self.network = network(spec.action_dim, spec.prediction_steps, spec.observation_steps, self.encoder.feature_dim)
        if not self.network.sees_time:
            raise PolicyError(
                f"{type(self.network).__name__} knows no time, which denoising needs: choose another network, "
                "or policy=ebt"
            )
        self.path = path
        self.to_clean = pick(TO_CLEAN, prediction, "prediction")
        self.target = pick(TARGET, prediction, "prediction")
        self.times = pick(TIMES, times, "times")
        self.solver = pick(SOLVERS, solver, "solver")
        if eta and self.solver is not sample:
            raise PolicyError(f"policy.solver={solver} is deterministic: set policy.eta=0, got {eta:g}")
        self.prediction, self.min_time, self.eta, self.clip = prediction, min_time, eta, clip
        self.fixed_steps: int | None = None
        self._settled: list[Settled] | None = None
        self._coefficients: Coefficients | None = None
        self.register_buffer("grid", uniform_grid(steps, start), persistent=False)
        self.check_grid(self.grid)

    grid: Tensor

    @property
    @final
    def noises(self) -> int:
        """See `Policy`."""
        return len(self.grid) - 1 if self.eta else 0

    @final
    def set_steps(self, steps: int) -> None:
        """Sample with K = `steps` from now on.

        Raises:
            PolicyError: the network has not learnt the times that they lead to, or so many steps.
        """
        if self.fixed_steps not in (None, steps):
            raise PolicyError(
                f"steps={steps}: this policy was distilled to {self.fixed_steps}, "
                f"distill another one with steps={steps}"
            )
        grid = uniform_grid(steps, self.grid[0].item()).to(self.grid.device)
        self.check_grid(grid)
        self.grid, self._settled, self._coefficients = grid, None, None

    @final
    @torch.no_grad()
    def freeze_times(self) -> None:
        """Compute what depends on the grid alone once for all chunks; for weights and options that stay as they are."""
        times, (one, zero) = self.embed_grid(self.grid), self.grid.new_tensor([[[[1.0]]], [[[0.0]]]])

        def settle(k: int) -> Settled:
            of = (self.to_clean(self.path, x, out, self.grid[k]).reshape(()) for x, out in ((one, zero), (zero, one)))
            return Settled(self.network.settle(_at(times, k)), *of)

        self._settled = [settle(k) for k in range(len(self.grid) - 1)]
        if self.solver is sample:
            self._coefficients = coefficients(self.path, self.grid[:-1], self.grid[1:], self.eta)

    @final
    def check_grid(self, grid: Tensor, options: str = "policy") -> None:
        """Refuse a grid on which the network is asked what it has not learnt, or what its prediction cannot tell.

        Raises:
            PolicyError: naming the `start` and `steps` of the group `options` that make the grid.
        """
        first, last, steps = grid[0], grid[-2].item(), len(grid) - 1
        # The times are rounded to float32: T steps end at the first of T knots, not a hair below it.
        if last < self.min_time * (1 - 1e-6):
            raise PolicyError(
                f"{options}.steps={steps} from {options}.start={first:g} asks the network at t = {last:.3g}, "
                f"but it is trained from t = {self.min_time:g} on: lower {options}.steps or raise {options}.start"
            )
        if self.prediction == "eps" and not self.path.alpha(first) > 0:
            raise PolicyError(
                f"policy.prediction=eps divides by alpha, which is 0 at {options}.start={first:g} of this path: "
                f"set {options}.start=0.99 or choose another prediction"
            )

    @final
    def encode(self, obs: Mapping[str, Tensor]) -> Features:
        """Observations {key: [B, To, ...]} in physical units -> what the network needs of them, once per decision."""
        return self.network.embed_observation(self.features(obs))

    @final
    def denoise(self, x_t: Tensor, t: Tensor, cond: Features) -> Tensor:
        """Expected clean chunk a_hat [B, Tp, Da] of x_t at times t [B], in normalised units."""
        return self._a_hat(x_t, t, self.network.embed_time(t), cond)

    @final
    def embed_grid(self, grid: Tensor) -> Features:
        """What the network computes of a grid's times alone, for `denoise_on`."""
        return self.network.embed_time(grid[:-1])

    @final
    def denoise_on(
        self, grid: Tensor, cond: Features, embedded: Features | None = None
    ) -> Callable[[Tensor, int | Tensor], Tensor]:
        """`denoise` at the times of a grid by index, one for all rows or one each [B].

        All that depends on time alone is computed here, once, unless `embedded` holds it (`embed_grid`).
        """
        times = self.embed_grid(grid) if embedded is None else embedded

        def denoise(x_t: Tensor, k: int | Tensor) -> Tensor:
            # Not f[k] with a tensor, whose backward pass takes three times as long.
            time = tuple(f.index_select(0, k.to(f.device)) for f in times) if isinstance(k, Tensor) else _at(times, k)
            return self._a_hat(x_t, grid[k], time, cond)

        return denoise

    @final
    def denoising_error(self, a: Tensor, cond: Features, t: Tensor, eps: Tensor) -> Tensor:
        """The network's prediction minus its target, elementwise [B, Tp, Da]; `a` normalised, t [B]."""
        out: Tensor = self.network(self.path.noisy(a, eps, t), self.network.embed_time(t), cond)
        return out.float() - self.target(self.path, a, eps, t)

    @final
    def denoising_loss(self, a: Tensor, cond: Features, t: Tensor, eps: Tensor) -> Tensor:
        """Squared error of the network's prediction per sample [B], mean over the chunk; `a` normalised [B, Tp, Da]."""
        return self.denoising_error(a, cond, t, eps).square().mean(dim=(1, 2))

    @final
    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """Times [B] and noise [B, Tp, Da], on the generator's own device."""
        device = None if generator is None else generator.device
        # One uniform shift of an equally spaced comb: every batch covers all times, at a lower variance of the loss.
        shift = torch.rand(1, generator=generator, device=device)
        u = (shift + torch.arange(batch_size, device=device) / batch_size) % 1
        t = self.min_time + (1 - self.min_time) * self.times(u)
        chunk = (self.spec.prediction_steps, self.spec.action_dim)
        return t, torch.randn(batch_size, *chunk, generator=generator, device=device)

    def _loss(self, features: Tensor, action: Tensor, draws: Draws) -> Loss:
        t, eps = draws
        total = self.denoising_loss(action, self.network.embed_observation(features), t, eps).mean()
        return Loss(total, {"denoising": total.detach()})

    def _sample(self, features: Tensor, noise: Tensor | None, generator: Generators) -> Tensor:
        shape = (len(features), self.spec.prediction_steps, self.spec.action_dim)
        start = start_noise(noise, shape, generator, features.device)
        denoise = self._denoise_on_grid(self.network.embed_observation(features))
        if self._coefficients is not None:
            return follow(self._coefficients, denoise, start, self.eta, generator)
        return self.solver(self.path, denoise, start, self.grid, self.eta, generator)

    def _denoise_on_grid(self, cond: Features) -> Callable[[Tensor, int], Tensor]:
        settled = self._settled
        if settled is None:
            return self.denoise_on(self.grid, cond)
        return lambda x_t, k: self._settled_a_hat(x_t, settled[k], cond)

    def _a_hat(self, x_t: Tensor, t: Tensor, time: Features, cond: Features) -> Tensor:
        return self._clipped(self.to_clean(self.path, x_t, self.network(x_t, time, cond), t))

    def _settled_a_hat(self, x_t: Tensor, settled: Settled, cond: Features) -> Tensor:
        return self._clipped(settled.of_x * x_t + settled.of_out * self.network(x_t, settled.time, cond))

    def _clipped(self, a_hat: Tensor) -> Tensor:
        return a_hat if self.clip is None else a_hat.clamp(-self.clip, self.clip)


def _at(times: Features, k: int) -> Features:
    """The features of one time of a grid."""
    return tuple(feature[k : k + 1] for feature in times)


@final
class DiffusionPolicy(DenoisingPolicy):
    """Diffusion Policy (Chi et al. 2023): variance-preserving path, DDIM or DDPM sampling.

    The default prediction is v, not the paper's eps: with few steps the grid starts at t = 1, where alpha is nearly 0
    and a_hat = (x - sigma eps_hat) / alpha is all error.

    Args:
        betas: "cosine" or "linear" noise schedule.
        train_steps: T, knots of the schedule.
        (others): see `DenoisingPolicy`.
    """

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        network: NetworkFactory,
        betas: str = "cosine",
        train_steps: int = 100,
        prediction: str = "v",
        times: str = "uniform",
        steps: int = 10,
        start: float = 1.0,
        eta: float = 0.0,
        solver: str = "transition",
        clip: float | None = 1.0,
        normalizers: Mapping[str, str] | None = None,
        relative_to: str | None = None,
    ) -> None:
        path = VariancePreservingPath(pick(BETAS, betas, "betas"), train_steps)
        # The first knot is the cleanest state that the discrete schedule knows.
        min_time = 1 / train_steps
        numbers = (prediction, times, min_time, steps, start, eta, solver, clip)
        super().__init__(spec, encoder, network, path, *numbers, normalizers, relative_to)


@final
class FlowPolicy(DenoisingPolicy):
    """Flow matching on the linear path (Lipman et al. 2023): the network predicts the velocity eps - a."""

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        network: NetworkFactory,
        prediction: str = "velocity",
        times: str = "uniform",
        steps: int = 10,
        start: float = 1.0,
        eta: float = 0.0,
        solver: str = "transition",
        clip: float | None = 1.0,
        normalizers: Mapping[str, str] | None = None,
        relative_to: str | None = None,
    ) -> None:
        numbers = (prediction, times, 1e-3, steps, start, eta, solver, clip)
        super().__init__(spec, encoder, network, LinearPath(), *numbers, normalizers, relative_to)
