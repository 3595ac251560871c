"""One network for the noisy part of the grid and another for the rest: a fine-tuned policy and the one it came from."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Features, Network, NetworkFactory


@final
class StagedNetwork(Network):
    """`early` at times above `switch`, `late` at and below it.

    Fine-tuning the last K' of K denoising steps (DPPO, Ren et al. 2024) leaves the earlier ones to the frozen network.
    Which network serves a time is decided on the CPU once per grid, so that no step waits for a device.

    Args:
        action_dim: Da.
        prediction_steps: Tp.
        observation_steps: To.
        feature_dim: F.
        network: builds each of the two.
        switch: time in (0, 1).

    Raises:
        PolicyError: `switch` is out of its range.
    """

    def __init__(
        self,
        action_dim: int,
        prediction_steps: int,
        observation_steps: int,
        feature_dim: int,
        network: NetworkFactory,
        switch: float,
    ) -> None:
        super().__init__(action_dim, prediction_steps, observation_steps, feature_dim)
        if not 0 < switch < 1:
            raise PolicyError(f"policy.network.switch must be in (0, 1), got {switch:g}")
        sizes = (action_dim, prediction_steps, observation_steps, feature_dim)
        self.early, self.late = network(*sizes), network(*sizes)
        self.switch = switch

    @classmethod
    def of(cls, early: Network, late: Network, switch: float) -> StagedNetwork:
        """Two networks that are there already, not copies of them."""
        parts = iter((early, late))
        sizes = (late.action_dim, late.prediction_steps, late.observation_steps, late.feature_dim)
        return cls(*sizes, network=lambda *_: next(parts), switch=switch)

    def embed_time(self, t: Tensor) -> Features:
        """Times [N] -> whether each is early [N] on the CPU, then the features of both networks."""
        return ((t > self.switch).cpu(), *self.early.embed_time(t), *self.late.embed_time(t))

    def settle(self, time: Features) -> Features:
        """The answer [1] for the one time becomes a shape, which a compiler knows: [0, 0] if early, [0, 1] if not."""
        early, late = _halves(time[1:])
        number = 0 if time[0].item() else 1
        return (torch.empty(0, number), *self.early.settle(early), *self.late.settle(late))

    def embed_observation(self, features: Tensor) -> Features:
        """Encoded observations [B, To, F] -> the features of both networks."""
        return (*self.early.embed_observation(features), *self.late.embed_observation(features))

    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        """Noisy chunks [B, Tp, Da] -> prediction [B, Tp, Da], from the one network if all times are on its side."""
        is_early, times = time[0], _halves(time[1:])
        settled = is_early.ndim == 2
        calls = list(zip((self.early, self.late), times, _halves(observation), strict=True))
        if settled:
            calls = [calls[is_early.shape[1]]]
        elif not is_early.any():
            calls = calls[1:]
        elif is_early.all():
            calls = calls[:1]
        out: list[Tensor] = [network(x, *features) for network, *features in calls]
        # One network's answer, or each row's own.
        return out[0] if len(out) == 1 else torch.where(is_early.to(x.device)[:, None, None], out[0], out[1])


def _halves(features: Features) -> tuple[Features, Features]:
    middle = len(features) // 2
    return features[:middle], features[middle:]
