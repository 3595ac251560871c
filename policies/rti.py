"""Real-time iteration: a chunk starts from the previous one instead of from noise, and takes a fraction of the steps.

RTI-DP (Duan et al. 2025, arXiv 2508.05396), after the real-time iteration of model predictive control. The previous
chunk, shifted by the steps executed since and with its last action repeated, becomes the state at a time `start`:

    x_start = alpha(start) a_previous + sigma(start) eps        re-noised, or
    x_start = a_previous                                        as it is (RTI-DP)

from where `steps` equal steps lead to 0. `start` is how much error of the guess can be mended: towards 0 the previous
chunk is repeated, at 1 (re-noised) the chunk is new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import ACTION, Observation, Policy
from flowsteer.policies.samplers import Generators, start_noise, uniform_grid

NOTHING = -1
"""The age of a row without a previous chunk."""


@final
@dataclass(frozen=True)
class RtiOptions:
    """How chunks are iterated.

    Attributes:
        start: time of the path at which the previous chunk is taken up, in (0, 1].
        steps: equal steps from there to 0.
        renoise: put the previous chunk on the path with new noise; false hands it to the network as it is.
        refresh_every: every so many decisions, sample from noise; 0 for never.
        jump: sample from noise when an observed number has changed by more than this since the last decision, in
            normalised units; 0 for never. Images are not looked at.
        binarise: of the discrete dimensions, take the nearer of their two values, in the previous chunk and in the new.
        discrete_weight: factor of the discrete dimensions of the previous chunk, in [0, 1]: what is small is easily
            changed.

    Raises:
        PolicyError: an option is out of its range.
    """

    start: float
    steps: int
    renoise: bool = True
    refresh_every: int = 50
    jump: float = 0.0
    binarise: bool = True
    discrete_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PolicyError(f"rti.steps must be at least 1, got {self.steps}")
        if not 0 < self.start <= 1:
            raise PolicyError(f"rti.start must be in (0, 1], got {self.start:g}")
        for name in ("refresh_every", "jump"):
            if not getattr(self, name) >= 0:
                raise PolicyError(f"rti.{name} must not be negative, got {getattr(self, name):g}")
        if not 0 <= self.discrete_weight <= 1:
            raise PolicyError(f"rti.discrete_weight must be in [0, 1], got {self.discrete_weight:g}")


class Last(NamedTuple):
    """Whether a last decision is known [B], on the CPU; its chunk [B, Tp, Da], physical; the numbers it saw [B, D]."""

    known: Tensor
    chunks: Tensor
    seen: Tensor


@final
class RealTimeIteration:
    """Decides in a policy's place and remembers, for each of several robots or environments, the last chunk.

    Chunks are kept absolute, in physical units: a normalised one may be relative to an observation that is gone.

    Args:
        policy: diffusion, flow or whatever else denoises; its weights must not change any more.
        options: how chunks are iterated.

    Raises:
        PolicyError: the policy does not denoise or not from `options.start`, or sees nothing that could jump.
    """

    def __init__(self, policy: Policy, options: RtiOptions) -> None:
        self.policy, self.options, self.spec = denoising(policy), options, policy.spec
        self._grid = uniform_grid(options.steps, options.start).to(self.policy.grid.device)
        self.policy.check_grid(self._grid, "rti")
        distilled = self.policy.fixed_steps
        if distilled is not None and (distilled, options.steps) != (1, 1):
            raise PolicyError(
                f"rti.steps={options.steps}: this policy was distilled to {distilled}, between whose times it has not "
                "learnt to jump: iterate its teacher, or one distilled by loss=consistency to steps=1 with rti.steps=1"
            )
        if options.jump and all(array.dtype == "uint8" for array in self.spec.observations.values()):
            raise PolicyError(f"rti.jump={options.jump:g}: the policy observes images only, set rti.jump=0")
        with torch.no_grad():
            self._times = self.policy.embed_grid(self._grid)
        self._discrete = list(self.spec.discrete)
        self.reset()

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the last chunks of some rows, or of all: at a stop, or when something else has moved the robot."""
        if rows is None:
            chunk, device = (self.spec.prediction_steps, self.spec.action_dim), self._grid.device
            numbers = sum(math.prod(array.shape) for array in self.spec.observations.values() if array.dtype != "uint8")
            self._chunks, self._seen = torch.zeros(0, *chunk, device=device), torch.zeros(0, numbers, device=device)
            self._age = torch.zeros(0, dtype=torch.int64)
        else:
            named = _checked_rows(torch.tensor(list(rows), dtype=torch.int64))
            self._age[named[named < len(self._age)]] = NOTHING

    @torch.no_grad()
    def decide(
        self,
        obs: Observation,
        *,
        executed: Tensor,
        rows: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Whole chunks [B, Tp, Da] in physical units, each from its row's last one.

        A row is sampled from noise, as the policy itself does, where an episode begins (`executed` is 0), nothing is
        left of the last chunk, the observation has jumped, and every `options.refresh_every` decisions.

        Args:
            obs: {key: [B, To, ...]} in physical units.
            executed: [B] control steps since the row's last decision.
            rows: [B] whose observations these are, all different; 0 to B - 1 when not given.
            noise: [B, Tp, Da] standard normal; drawn from `generator` where it is not given.
            generator: one for the batch or one per row.

        Raises:
            PolicyError: batch sizes differ, `executed` or a row is negative, a row is named twice, or a last chunk was
                not finite.
        """
        seen = observed_numbers(self.policy, obs)
        _check_batch(len(seen), executed=executed, rows=rows, noise=noise)
        rows = torch.arange(len(seen)) if rows is None else _checked_rows(rows.cpu())
        self._make_room(rows)
        stale = self._stale(rows, executed.cpu(), seen)
        chunks = torch.empty(len(seen), *self._chunks.shape[1:], device=seen.device)
        for fresh in (True, False):
            index = (stale == fresh).nonzero().flatten()
            if len(index):
                some = {key: value[index.to(value.device)] for key, value in obs.items()}
                own = None if noise is None else noise[index.to(noise.device)]
                drawn = [generator[i] for i in index.tolist()] if isinstance(generator, Sequence) else generator
                chunks[index] = (
                    self.policy.predict(some, noise=own, generator=drawn)
                    if fresh
                    else self.iterate(some, self._chunks[rows[index]], executed[index], noise=own, generator=drawn)
                )
        self._chunks[rows], self._seen[rows] = chunks, seen
        self._age[rows] = torch.where(stale, 0, self._age[rows] + 1)
        return self._nearer_values(chunks)

    def last(self, rows: Tensor) -> Last:
        """What is remembered of rows [B]."""
        known = rows < len(self._age)
        if len(self._age) == 0:
            return Last(known, self._chunks.new_zeros(len(rows), *self._chunks.shape[1:]), self._seen)
        at = torch.where(known, rows, 0)
        return Last(known & (self._age[at] != NOTHING), self._chunks[at], self._seen[at])

    @torch.no_grad()
    def iterate(
        self,
        obs: Observation,
        previous: Tensor,
        executed: Tensor,
        *,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Chunks [B, Tp, Da] from given ones, both in physical units; remembers nothing.

        Args:
            obs, noise, generator: as in `decide`.
            previous: [B, Tp, Da], absolute.
            executed: [B] control steps since then, from 0 to Tp - 1.

        Raises:
            PolicyError: `previous` is of another batch size or horizon or not finite, or nothing of it is left.
        """
        guess = self.guess(obs, previous, executed)
        return self.policy.physical(self.refine(obs, guess, noise=noise, generator=generator), obs)

    def guess(self, obs: Observation, previous: Tensor, executed: Tensor) -> Tensor:
        """Previous chunks as of now and in network units, [B, Tp, Da]; arguments and errors as `iterate`."""
        self._check_previous(len(next(iter(obs.values()))), previous, executed)
        steps = torch.arange(self.spec.prediction_steps, device=previous.device)
        shifted = (steps + executed.to(steps.device)[:, None]).clamp(max=len(steps) - 1)
        now = self._nearer_values(previous.gather(1, shifted[..., None].expand_as(previous)))
        a = self.policy.normalizer.normalize(ACTION, self.policy.relative(now, obs))
        a[..., self._discrete] *= self.options.discrete_weight
        bound = self.policy.clip
        return a if bound is None else a.clamp(-bound, bound)

    def refine(
        self, obs: Observation, guess: Tensor, *, noise: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Chunks [B, Tp, Da] from guesses [B, Tp, Da], both in network units; other arguments as `decide`."""
        policy, x = self.policy, guess
        if self.options.renoise:
            eps = start_noise(noise, guess.shape, generator, guess.device)
            x = policy.path.noisy(guess, eps, self._grid[0])
        denoise = policy.denoise_on(self._grid, policy.encode(obs), self._times)
        return policy.solver(policy.path, denoise, x, self._grid, policy.eta, generator)

    def _stale(self, rows: Tensor, executed: Tensor, seen: Tensor) -> Tensor:
        """Which rows cannot go on from their last chunk, [B] bool on the CPU."""
        age, options = self._age[rows], self.options
        stale = (age == NOTHING) | (executed == 0) | (executed >= self.spec.prediction_steps)
        if options.refresh_every:
            stale |= age + 1 >= options.refresh_every
        if options.jump:
            stale |= ((seen - self._seen[rows]).abs().amax(dim=1) > options.jump).cpu()
        return stale

    def _make_room(self, rows: Tensor) -> None:
        more = int(rows.max()) + 1 - len(self._age)
        if more > 0:
            self._chunks = torch.cat([self._chunks, self._chunks.new_zeros(more, *self._chunks.shape[1:])])
            self._seen = torch.cat([self._seen, self._seen.new_zeros(more, self._seen.shape[1])])
            self._age = torch.cat([self._age, torch.full((more,), NOTHING)])

    def _nearer_values(self, chunks: Tensor) -> Tensor:
        """Chunks in physical units with the discrete dimensions at the nearer of their two values."""
        if not self._discrete or not self.options.binarise:
            return chunks
        # No chunk is relative in these dimensions.
        ones = torch.full_like(chunks[:1, :1], self.spec.discrete_scale)
        low, high = (self.policy.normalizer.unnormalize(ACTION, sign * ones)[..., self._discrete] for sign in (-1, 1))
        now, nearer = chunks[..., self._discrete], chunks.clone()
        nearer[..., self._discrete] = torch.where(now > (low + high) / 2, high, low)
        return nearer

    def _check_previous(self, batch: int, previous: Tensor, executed: Tensor) -> None:
        wanted = (batch, self.spec.prediction_steps, self.spec.action_dim)
        if tuple(previous.shape) != wanted:
            raise PolicyError(f"the previous chunks must have shape {list(wanted)}, got {list(previous.shape)}")
        _check_batch(batch, executed=executed)
        gone = int(executed.max()) if batch else 0
        if gone >= wanted[1]:
            raise PolicyError(
                f"{gone} steps of a chunk of {wanted[1]} are executed: nothing of it is left to start from"
            )
        if not bool(previous.isfinite().all()):
            raise PolicyError("a previous chunk is not finite: the policy has diverged or its normaliser is broken")


def observed_numbers(policy: Policy, obs: Observation) -> Tensor:
    """What is observed now, but for images, in normalised units [B, D]."""
    now = [policy.normalized(key, obs)[:, -1].flatten(1) for key in policy.spec.observations]
    # Images are bytes; of them only the batch size is taken.
    return torch.cat([numbers if numbers.is_floating_point() else numbers[:, :0].float() for numbers in now], dim=1)


def denoising(policy: Policy) -> DenoisingPolicy:
    """The policy, if it can be iterated.

    Raises:
        PolicyError: it does not denoise; names what does.
    """
    if not isinstance(policy, DenoisingPolicy):
        raise PolicyError(
            f"real-time iteration starts a denoising from the previous chunk, and {type(policy).__name__} does not "
            "denoise: use policy=diffusion or policy=flow"
        )
    return policy


def _checked_rows(rows: Tensor) -> Tensor:
    if len(rows) and (int(rows.min()) < 0 or len(set(rows.tolist())) < len(rows)):
        raise PolicyError(f"rows must be different and not negative, got {rows.tolist()}")
    return rows


def _check_batch(batch: int, *, executed: Tensor, rows: Tensor | None = None, noise: Tensor | None = None) -> None:
    for name, tensor in {"executed": executed, "rows": rows, "noise": noise}.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.ndim == 0):
            raise PolicyError(f"{name} must be a tensor with a row for each observation, got {tensor!r}")
        if tensor is not None and len(tensor) != batch:
            raise PolicyError(f"{name} must have {batch} rows as the observations have, got {list(tensor.shape)}")
    if executed.is_floating_point():
        raise PolicyError(f"executed must count control steps, got {executed.dtype}")
    if batch and int(executed.min()) < 0:
        raise PolicyError(f"executed must not be negative, got {int(executed.min())}")
