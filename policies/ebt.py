"""The energy-based transformer (EBT): a policy that descends its own energy from noise to a chunk.

A network f, which is told no time, gives each chunk under an observation an energy, and autograd its gradient::

    E(x) = <x, f(x)>
    y_k = x_k + mu v_k,   v_k+1 = mu v_k - alpha dE/dx(y_k),   x_k+1 = x_k + v_k+1        (Nesterov)

Training descends as well: a step is to go an equal share of the way from noise to demonstration, or all that is left of
it, and its error reaches the weights through the second derivatives of E. Where chains of steps start decides what is
learnt. From noise (EBT-Policy, Davies et al. 2025) a chain's end can know nothing of the demonstration that it is
compared with: the least squared error is at the mean of all that fit the observation, say between two ways round an
obstacle. So chains start on the way, and demonstrations become the points where the field rests (Equilibrium Matching,
Wang & Du 2025). Only those that start within a step of a demonstration, where there is nothing left to choose, walk
several steps, and learn from where these lead: without them a chunk that has arrived would not stay.

Training knows differences of energy only. So that it tells something across observations as well, it is reported
relative to that of noise: how far down a chunk lies, the further the surer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowsteer.policies.choices import pick
from flowsteer.policies.encoders.base import EncoderFactory
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Features, NetworkFactory
from flowsteer.policies.policy import ACTION, Draws, Loss, Observation, Policy
from flowsteer.policies.samplers import Generators, start_noise
from flowsteer.policies.spec import PolicySpec


class Descent(NamedTuple):
    """Where descents ended.

    chunk: [B, Tp, Da] in physical units.
    energy: [B] of the chunks, relative to that of noise; the lower the surer.
    steps: [B] gradient steps that each row took.
    """

    chunk: Tensor
    energy: Tensor
    steps: Tensor


class Condition(NamedTuple):
    """What the network computes of time 0, the only one that it is asked at [1, ...], and of observations [B, ...]."""

    time: Features
    observation: Features

    def each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """With other rows of the observations."""
        return Condition(self.time, tuple(map(change, self.observation)))


def gradient_length(move: Tensor, change: Tensor) -> Tensor:
    """Length of a plain step, alpha |dE/dx|, as root mean square over the chunk [B]."""
    return rms(move)


def energy_length(move: Tensor, change: Tensor) -> Tensor:
    """Length of the step that takes so much energy off in a bowl of curvature 1 / alpha, root mean square [B].

    `change` is alpha times the change of energy: at the bottom of such a bowl a step of length d takes off d^2 / 2.
    """
    return (2 * change.abs() / move[0].numel()).sqrt()


REFERENCES = 16
"""Chunks of noise that energies are relative to; the same in all policies, and stored with them."""
NEAR = 4
"""One in so many training chains starts within a step of its demonstration."""
LENGTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"gradient": gradient_length, "energy": energy_length}


def rms(x: Tensor) -> Tensor:
    """Root mean square over the chunk, [B, Tp, Da] -> [B]; each row's own, whatever its batch."""
    return x.square().mean((1, 2)).sqrt()


@final
class EnergyPolicy(Policy):
    """Descends a learnt energy from noise, each row until it rests.

    Args:
        spec: see `Policy`.
        encoder: see `Policy`.
        network: builds f from Da, Tp, To, F; it is asked at time 0 only.
        reach: share of the way from noise to demonstration that a step of training is to go, in (0, 1]; the last step
            goes all that is left. With less of it a chunk takes more steps, and modes are kept apart better.
        train_steps: training chains that start near a demonstration have 1 to so many steps.
        step_spread: these are longer or shorter than alpha by a factor of up to this, at least 1.
        langevin: std of the noise on the points of training chains, in normalised units.
        momentum: mu, in [0, 1).
        stop: what tells that a row rests: the length of its "gradient" or the change of its "energy".
        tolerance: root mean square of the step, in normalised units, below which it does; 0 takes all `max_steps`.
        max_steps: most gradient steps of a chunk.
        normalizers, relative_to: see `Policy`.

    Raises:
        PolicyError: an option is unknown or out of its range.
    """

    differentiates = True

    def __init__(
        self,
        spec: PolicySpec,
        encoder: EncoderFactory,
        network: NetworkFactory,
        reach: float = 0.25,
        train_steps: int = 4,
        step_spread: float = 1.5,
        langevin: float = 0.05,
        momentum: float = 0.1,
        stop: str = "gradient",
        tolerance: float = 0.05,
        max_steps: int = 6,
        normalizers: Mapping[str, str] | None = None,
        relative_to: str | None = None,
    ) -> None:
        super().__init__(spec, encoder, normalizers, relative_to)
        for name, value, right, must in (
            ("reach", reach, 0 < reach <= 1, "in (0, 1]"),
            ("train_steps", train_steps, train_steps >= 1, "at least 1"),
            ("step_spread", step_spread, 1 <= step_spread < math.inf, "at least 1"),
            ("langevin", langevin, 0 <= langevin < math.inf, "at least 0"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("tolerance", tolerance, 0 <= tolerance < math.inf, "at least 0"),
            ("max_steps", max_steps, max_steps >= 1, "at least 1"),
        ):
            if not right:
                raise PolicyError(f"policy.{name} must be {must}, got {value:g}")
        self.network = network(spec.action_dim, spec.prediction_steps, spec.observation_steps, self.encoder.feature_dim)
        # Part of the module, so that it is optimised, averaged and saved with the weights.
        self.log_step_size = nn.Parameter(torch.tensor(math.log(reach)))
        shape = (REFERENCES, spec.prediction_steps, spec.action_dim)
        self.register_buffer("references", torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.length = pick(LENGTHS, stop, "policy.stop")
        self.reach, self.train_steps, self.step_spread, self.langevin = reach, train_steps, step_spread, langevin
        self.momentum, self.tolerance, self.max_steps = momentum, tolerance, max_steps

    references: Tensor

    @property
    def step_size(self) -> Tensor:
        """alpha, learnt with the weights."""
        return self.log_step_size.exp()

    def descend(self, obs: Observation, *, noise: Tensor | None = None, generator: Generators = None) -> Descent:
        """What `predict` returns, and how sure it is; arguments as there."""
        with torch.no_grad():
            features = self.features(obs)
            a, steps = self._descend(features, noise, generator)
            return Descent(self.physical(a, obs), self._depth(a, features), steps)

    @torch.no_grad()
    def energy(self, obs: Observation, chunk: Tensor) -> Tensor:
        """Energy [B] of chunks [B, Tp, Da] in physical units, relative to that of noise; the lower the surer.

        Raises:
            PolicyError: the chunks are not whole ones, such as `predict` gives; `act` gives the executed part.
        """
        wanted = (self.spec.prediction_steps, self.spec.action_dim)
        if tuple(chunk.shape[1:]) != wanted:
            raise PolicyError(f"a chunk must have shape [B, {wanted[0]}, {wanted[1]}], got {list(chunk.shape)}")
        return self._depth(self.normalizer.normalize(ACTION, self.relative(chunk, obs)), self.features(obs))

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Draws:
        """Starts [B] and noise [B, Tp, Da] of chains; of their n steps: sizes [B, n], noise [B, n, Tp, Da]."""
        chunk = (self.spec.prediction_steps, self.spec.action_dim)
        # An equally spaced comb, as in `DenoisingPolicy.draw`.
        u = (torch.rand(1, generator=generator) + torch.arange(batch_size) / batch_size) % 1
        eps = torch.randn(batch_size, *chunk, generator=generator)
        # How many is told by the shape, which no device has to be asked for.
        n = int(torch.randint(1, self.train_steps + 1, (), generator=generator))
        sizes = self.step_spread ** (2 * torch.rand(batch_size, n, generator=generator) - 1)
        return u, eps, sizes, torch.randn(batch_size, n, *chunk, generator=generator)

    def _loss(self, features: Tensor, action: Tensor, draws: Draws) -> Loss:
        u, eps, sizes, noises = draws
        near = slice(None, None, NEAR)
        t = torch.lerp(u.new_tensor(self.reach), torch.ones_like(u), u)
        t[near] = self.reach * u[near]
        cond = self._condition(features)
        x = torch.lerp(action, eps, t[:, None, None])
        x[near] = self._walk(x[near], cond.each(lambda part: part[near]), sizes[near], noises[near])
        x = x + self._warmth() * noises[:, -1]
        gradient, _ = self._gradient(x, cond, second_order=torch.is_grad_enabled())
        error = (self.step_size * gradient - self._wanted(x, action, eps)) / self.reach
        total = error.square().mean()
        return Loss(total, {"descent": total.detach()})

    def _walk(self, x: Tensor, cond: Condition, sizes: Tensor, noises: Tensor) -> Tensor:
        """Where all steps but the last lead from x [B, Tp, Da], and the look ahead from there."""
        v, alpha = torch.zeros_like(x), self.step_size.detach()
        for k in range(sizes.shape[1] - 1):
            x = x + self._warmth() * noises[:, k]
            gradient, _ = self._gradient(x + self.momentum * v, cond)
            v = self.momentum * v - alpha * sizes[:, k, None, None] * gradient
            x = x + v
        return (x + self.momentum * v).detach()

    def _warmth(self) -> float:
        """Std of Langevin noise, which is of training alone."""
        return self.langevin if self.training else 0.0

    def _wanted(self, y: Tensor, action: Tensor, eps: Tensor) -> Tensor:
        """What a step from y is to take away: `reach` of the way from noise to demonstration, or all that is left."""
        left = y - action
        share = self.reach * rms(eps - action) / rms(left)
        return left * share.clamp(max=1)[:, None, None]

    def _sample(self, features: Tensor, noise: Tensor | None, generator: Generators) -> Tensor:
        return self._descend(features, noise, generator)[0]

    def _descend(self, features: Tensor, noise: Tensor | None, generator: Generators) -> tuple[Tensor, Tensor]:
        """Normalised chunks at rest [B, Tp, Da], gradient steps of each row [B]."""
        shape = (len(features), self.spec.prediction_steps, self.spec.action_dim)
        start = start_noise(noise, shape, generator, features.device)
        # Autograd takes no tensors of inference mode, but their copies.
        with torch.inference_mode(False):
            return self._run(start.clone(), self._condition(features.clone()))

    def _run(self, x: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        a, steps = x.clone(), torch.zeros(len(x), dtype=torch.long, device=x.device)
        rows, v, before = torch.arange(len(x), device=x.device), torch.zeros_like(x), x.new_full((len(x),), math.inf)
        alpha = self.step_size.detach()
        for _ in range(self.max_steps):
            y = x + self.momentum * v
            gradient, energy = self._gradient(y, cond)
            move = alpha * gradient
            v = self.momentum * v - move
            x = x + v
            a[rows], steps[rows] = x, steps[rows] + 1
            moving = self.length(move, alpha * (energy - before)) >= self.tolerance
            if not bool(moving.any()):
                break
            # Rows at rest cost nothing from here on, and stay as they are.
            x, v, before, rows = (part[moving] for part in (x, v, energy, rows))
            cond = cond.each(lambda part, moving=moving: part[moving])  # type: ignore[misc]
        return a, steps

    def _condition(self, features: Tensor) -> Condition:
        """Of features [B, To, F]."""
        time = self.network.embed_time(features.new_zeros(1))
        return Condition(time, self.network.embed_observation(features))

    def _gradient(self, x: Tensor, cond: Condition, second_order: bool = False) -> tuple[Tensor, Tensor]:
        """dE/dx [B, Tp, Da] and E [B]; with `second_order` the gradient depends on the weights in its turn."""
        with torch.enable_grad(), _twice_differentiable(second_order):
            x = x.detach().requires_grad_()
            energy = self._energy(x, cond)
            (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=second_order)
        return gradient, energy.detach()

    def _energy(self, x: Tensor, cond: Condition) -> Tensor:
        """E [B] of normalised chunks [B, Tp, Da]."""
        energy: Tensor = (x * self.network(x, *cond).to(x.dtype)).sum((1, 2))
        return energy

    def _depth(self, a: Tensor, features: Tensor) -> Tensor:
        """E [B] of normalised chunks [B, Tp, Da], less its mean over some noise."""
        cond, count = self._condition(features), len(self.references)
        noise = self.references.repeat(len(a), 1, 1)
        around = self._energy(noise, cond.each(lambda part: part.repeat_interleave(count, 0)))
        return self._energy(a, cond) - around.reshape(len(a), count).mean(1)


def _twice_differentiable(needed: bool) -> AbstractContextManager[object]:
    """Attention by its plain formula: torch's fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()
