"""A policy that does not learn any more, and what to try it with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.samplers import Generators, randn, start_noise
from flowsteer.policies.spec import ArraySpec


def frozen_copy(policy: Policy, steps: int | None) -> Policy:
    """A copy that is not trained any more, with K = `steps` where given.

    Raises:
        PolicyError: the policy does not denoise, or not at the times that they lead to.
    """
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)
    if steps is not None:
        if not isinstance(frozen, DenoisingPolicy):
            raise PolicyError(f"steps={steps}: {type(policy).__name__} does not denoise, leave steps out")
        frozen.set_steps(steps)
    return frozen


def draw(policy: Policy, batch: int, noise: Tensor | None, generator: Generators) -> tuple[Tensor, Tensor]:
    """The random numbers of `Policy.act` in its order: the starting noise, then that of the steps [n, B, Tp, Da].

    Raises:
        PolicyError: `noise` has another shape than [batch, Tp, Da].
    """
    shape, device = (batch, policy.spec.prediction_steps, policy.spec.action_dim), device_of(policy)
    start = start_noise(noise, shape, generator, device)
    later = [randn(shape, generator, device) for _ in range(policy.noises)]
    return start, torch.stack(later) if later else torch.empty(0, *shape, device=device)


def likely_observations(policy: Policy, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Observations {key: [B, To, ...]} to try a policy with: normal in network units, images of random bytes."""

    def of(key: str, array: ArraySpec) -> Tensor:
        shape = (batch, policy.spec.observation_steps, *array.shape)
        if array.dtype == "uint8":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device_of(policy))
        return policy.normalizer.unnormalize(key, torch.randn(shape, generator=generator).to(device_of(policy)))

    return {key: of(key, array) for key, array in policy.spec.observations.items()}


def device_of(policy: Policy) -> torch.device:
    """Where it runs."""
    device: torch.device = next(policy.buffers()).device
    return device
