"""The contract of on-policy algorithms: how a policy explores, and what an update descends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowsteer.policies.denoising import DenoisingPolicy
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.policy import Observation, Policy
from flowsteer.policies.spec import configurable
from flowsteer.rl_finetune.errors import FinetuneError

Memory = dict[str, Tensor]
"""What an algorithm remembers of its decisions, tensors [B, ...]."""


class Explored(NamedTuple):
    """Chunks to execute, in physical units [B, Ta, Da], and what their update will need."""

    actions: Tensor
    memory: Memory


class Step(NamedTuple):
    """Rows of an update.

    loss: scalar to descend.
    log_ratio: of new over old probability (or what stands for it), detached; [R], or [R * N] with N of them a row.
    clipped: bool, as long, whose ratio has left the trust region.
    parts: scalars for the log, detached.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor
    parts: dict[str, Tensor]

    def scaled(self, share: float) -> Step:
        """The same rows, their means times `share`, without the graph."""
        parts = {name: share * value for name, value in self.parts.items()}
        return Step(share * self.loss.detach(), self.log_ratio, self.clipped, parts)

    @staticmethod
    def sum(steps: Sequence[Step]) -> Step:
        """All rows, one after the other."""
        losses, log_ratios, clipped, parts = zip(*steps, strict=True)
        total = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        return Step(torch.stack(losses).sum(), torch.cat(log_ratios), torch.cat(clipped), total)


@configurable
class Algorithm(nn.Module, ABC):
    """Improves a policy from its own decisions.

    Concrete algorithms are final. A decision gives `rows` rows of an update, row k of each being e.g. one of its
    fine-tuned denoising steps.

    Args:
        policy: the cloned policy; its weights are the ones that learn.
        train_encoder: whether its encoder learns as well.
    """

    rows: int = 1
    scale: float = 1.0
    """What the reduction over the elements of a chunk makes of ones: 1 of a mean, their number of a sum. Log-ratios and
    what rounding leaves of them grow with it."""
    headline: str
    """What to know of its trust region, in one line for the start of a run."""

    def __init__(self, policy: Policy, train_encoder: bool) -> None:
        super().__init__()
        self.policy, self.train_encoder = policy, train_encoder
        policy.encoder.requires_grad_(train_encoder)
        self.progress = 0.0
        """Share of the training that is done; the loop sets it between iterations."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What an update spends its time on, forwards and backwards."""

    @abstractmethod
    def explore(self, obs: Observation, features: Tensor, generator: torch.Generator) -> Explored:
        """Sample chunks for observations {key: [B, To, ...]}, encoded [B, To, F], with noise to learn from."""

    @abstractmethod
    def step(self, features: Tensor, memory: Memory, decision: Tensor, row: Tensor, advantage: Tensor) -> Step:
        """What to descend for some rows.

        Args:
            features: encoded observations [D, To, F] of some decisions.
            memory: of the same decisions, [D, ...].
            decision: [R], which of the D decisions each row belongs to.
            row: [R], which of its rows it is, in [0, rows).
            advantage: [R].
        """

    @abstractmethod
    def acting(self) -> Policy:
        """The policy that is judged, saved and deployed; it shares the weights that learn where it can."""

    @abstractmethod
    def describe(self, config: dict[str, Any]) -> dict[str, Any]:
        """The "policy" part of a checkpoint that rebuilds `acting()`, from that of the cloned policy."""


def denoising(policy: Policy, algo: str) -> DenoisingPolicy:
    """The policy as one that denoises.

    Raises:
        FinetuneError: it does not.
    """
    if not isinstance(policy, DenoisingPolicy):
        gaussian = isinstance(policy, GaussianPolicy)
        remedy = "algo=ppo takes it" if gaussian else "no algorithm here takes it: clone one that denoises"
        raise FinetuneError(
            f"algo={algo} needs a policy that denoises (policy=diffusion or policy=flow), this is of the class "
            f"{type(policy).__name__}; {remedy}"
        )
    return policy


def check_options(*options: tuple[str, bool, str, float]) -> None:
    """Refuse options (name, whether it is right, what it must be, its value) of an algorithm.

    Raises:
        FinetuneError: naming the first that is not.
    """
    for name, right, must, value in options:
        if not right:
            raise FinetuneError(f"algo.{name} must be {must}, got {value:g}")
