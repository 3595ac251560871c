"""How much noise a denoising step explores with, where its own is too little to learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.networks.mlp import MLP
from flowsteer.policies.spec import configurable
from flowsteer.rl_finetune.errors import FinetuneError


@configurable
class Exploration(nn.Module, ABC):
    """Standard deviation of fine-tuned denoising steps, in normalised units.

    Args:
        rows: K', from the noisiest step.
        observed: To * F, width of an encoded observation.
        action_dim: Da.
    """

    def __init__(self, rows: int, observed: int, action_dim: int) -> None:
        super().__init__()
        self.rows, self.observed, self.action_dim = rows, observed, action_dim

    @abstractmethod
    def levels(self, features: Tensor, progress: float) -> Tensor:
        """What every fine-tuned step of some decisions has to explore with, once for all their rows: [D, K', Da or 1].

        Args:
            features: encoded observations [D, To, F].
            progress: share of the training that is done.
        """

    @abstractmethod
    def forward(self, std: Tensor, level: Tensor) -> Tensor:
        """The deviation of a transition, broadcastable to [R, Tp, Da].

        Args:
            std: the transition's own, broadcastable to [R, Tp, Da].
            level: of its decision and step, [R, 1, Da or 1].
        """


@final
class NoiseFloor(Exploration):
    """At least a floor (DPPO's): `first` at the noisiest fine-tuned step, `last` at the last, straight in between.

    The last one is what reaches the actions: 0.1 is a tenth of half their range.

    Args:
        rows, observed, action_dim: see `Exploration`.
        first: floor of the noisiest fine-tuned step.
        last: floor of the last one.
        final_share: by which both are multiplied at the end of training, reached straight.

    Raises:
        FinetuneError: a floor is not positive: log-probabilities would be infinite.
    """

    def __init__(
        self,
        rows: int,
        observed: int,
        action_dim: int,
        first: float = 0.1,
        last: float = 0.1,
        final_share: float = 1.0,
    ) -> None:
        super().__init__(rows, observed, action_dim)
        if not (first > 0 and last > 0 and final_share > 0):
            raise FinetuneError(
                f"algo.exploration's floors must be positive, got {first:g} and {last:g} times {final_share:g}"
            )
        floor = torch.linspace(first, last, rows) if rows > 1 else torch.tensor([last])
        # An option, not state: a resumed run may have another.
        self.register_buffer("floor", floor, persistent=False)
        self.final_share = final_share

    floor: Tensor

    def levels(self, features: Tensor, progress: float) -> Tensor:
        """See `Exploration`."""
        share = 1 + progress * (self.final_share - 1)
        return (share * self.floor)[None, :, None].expand(len(features), -1, 1)

    def forward(self, std: Tensor, level: Tensor) -> Tensor:
        """See `Exploration`."""
        return torch.maximum(std, level)


@final
class LearnedNoise(Exploration):
    """A network's choice between two bounds (ReinFlow, Zhang et al. 2025), per action dimension; left out when judged.

    It comes on top of the transition's own noise. With `algo.eta=0` there is none of that, as in the paper: the mean is
    the ODE's step, and the judged policy is deterministic.

    Args:
        rows, observed, action_dim: see `Exploration`.
        low: smallest deviation.
        high: largest.
        hidden: widths of the network.

    Raises:
        FinetuneError: unless 0 < low < high.
    """

    def __init__(
        self,
        rows: int,
        observed: int,
        action_dim: int,
        low: float = 0.05,
        high: float = 0.2,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(rows, observed, action_dim)
        if not 0 < low < high:
            raise FinetuneError(f"algo.exploration needs 0 < low < high, got {low:g} and {high:g}")
        self.net = MLP((observed, *hidden, rows * action_dim))
        self.register_buffer("bounds", torch.tensor([low, high]).log(), persistent=False)

    bounds: Tensor

    def levels(self, features: Tensor, progress: float) -> Tensor:
        """See `Exploration`."""
        chosen: Tensor = self.net(features.flatten(1)).unflatten(1, (self.rows, self.action_dim)).tanh()
        low, high = self.bounds.unbind()
        return (low + (high - low) * (chosen + 1) / 2).exp()

    def forward(self, std: Tensor, level: Tensor) -> Tensor:
        """See `Exploration`."""
        return (std.square() + level.square()).sqrt()
