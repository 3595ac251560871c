"""Hyper-parameters of the on-policy loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from flowsteer.policies.spec import configurable
from flowsteer.rl_finetune.errors import FinetuneError


@final
@configurable
@dataclass(frozen=True)
class OnPolicyConfig:
    """Hyper-parameters of the loop; an iteration collects, then updates.

    Attributes:
        env_steps: control steps of all environments together, until which to go on.
        decisions: S, of each environment in an iteration.
        epochs: passes over an iteration's rows.
        batch_size: rows of a minibatch, over all processes together; a decision of DPPO has K' of them.
        micro_batch_size: rows whose gradients are computed at a time, which bounds the memory that a minibatch takes;
            as many as suit the device where not given.
        critic_batch_size: decisions of a minibatch of the critic.
        lr: of the policy, AdamW without decay.
        critic_lr: of the critic.
        critic_warmup: first iterations, in which the critic learns alone.
        grad_clip: largest gradient norm.
        gamma: discount of one decision.
        lam: lambda of the advantage estimate.
        scale_rewards: divide by the running deviation of the discounted return.
        target_kl: an iteration's update ends when the policy has moved this far.
        max_kl: the run ends, with the last checkpoint kept, when it has moved this far.
        compile: run the policy's network through torch.compile.
        evaluate_every: iterations between evaluations on unseen seeds, 0 for none; the first comes before any update.
        save_every: iterations between checkpoints.
        restart_every: iterations after which all environments start new episodes. What runs in a simulator cannot be
            saved, so they do as well whenever the policy is judged or a checkpoint saved.

    Raises:
        FinetuneError: a value is out of its range.
    """

    env_steps: int = 3_000_000
    decisions: int = 200
    epochs: int = 5
    batch_size: int = 10_000
    micro_batch_size: int | None = None
    critic_batch_size: int = 1000
    lr: float = 1e-4
    critic_lr: float = 1e-3
    critic_warmup: int = 1
    grad_clip: float = 1.0
    gamma: float = 0.99
    lam: float = 0.95
    scale_rewards: bool = True
    target_kl: float = 0.001
    max_kl: float = 0.1
    compile: bool = False
    evaluate_every: int = 10
    save_every: int = 10
    restart_every: int = 1

    def __post_init__(self) -> None:
        sizes = ("batch_size", "micro_batch_size", "critic_batch_size")
        for name in ("env_steps", "decisions", "epochs", *sizes, "save_every", "restart_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FinetuneError(f"train.{name} must be at least 1, got {value}")
        for name in ("lr", "critic_lr", "grad_clip", "target_kl", "max_kl"):
            if not 0 < getattr(self, name) < math.inf:
                raise FinetuneError(f"train.{name} must be positive and finite, got {getattr(self, name):g}")
        if self.target_kl > self.max_kl:
            raise FinetuneError(
                f"train.target_kl={self.target_kl:g}, where an update ends, must not be above "
                f"train.max_kl={self.max_kl:g}, where the run ends"
            )
        for name in ("critic_warmup", "evaluate_every"):
            if getattr(self, name) < 0:
                raise FinetuneError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise FinetuneError(f"train.{name} must be in [0, 1], got {getattr(self, name):g}")
