"""Hyper-parameters of behaviour cloning, and what follows from them alone: the learning rate and the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.policy import Policy
from flowsteer.policies.spec import configurable


@final
@configurable
@dataclass(frozen=True)
class CloningConfig:
    """Hyper-parameters of the loop; `every` values count optimiser steps, 0 means never.

    Attributes:
        steps: optimiser steps in all; the cosine schedule ends there.
        lr: peak learning rate of AdamW.
        beta2: second moment decay of AdamW, in [0, 1).
        weight_decay: on matrices only, not on biases and norms.
        warmup_steps: linear warm-up.
        grad_clip: largest gradient norm.
        ema_power: warm-up of the average, see `Ema`.
        ema_max_decay: its final decay, in [0, 1); 0 for no average.
        precision: "auto" (bfloat16 where it is measured to be faster), "float32" or "bfloat16".
        compile: run the loss through torch.compile.
        log_every: steps between lines of the log.
        validate_every: steps between validation losses.
        evaluate_every: steps between evaluations in simulation.
        save_every: steps between checkpoints (the last step always makes one).

    Raises:
        PolicyError: a value is out of its range.
    """

    steps: int = 20000
    lr: float = 1e-3
    beta2: float = 0.95
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    grad_clip: float = 1.0
    ema_power: float = 0.75
    ema_max_decay: float = 0.999
    precision: str = "auto"
    compile: bool = False
    log_every: int = 100
    validate_every: int = 1000
    evaluate_every: int = 5000
    save_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "grad_clip", "log_every"):
            if not getattr(self, name) > 0:
                raise PolicyError(f"train.{name} must be positive, got {getattr(self, name):g}")
        for name in ("warmup_steps", "weight_decay", "ema_power", "validate_every", "evaluate_every", "save_every"):
            if not getattr(self, name) >= 0:
                raise PolicyError(f"train.{name} must not be negative, got {getattr(self, name):g}")
        for name in ("beta2", "ema_max_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise PolicyError(f"train.{name} must be in [0, 1), got {getattr(self, name):g}")
        for name in ("lr", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise PolicyError(f"train.{name} must be finite, got {getattr(self, name):g}")


def learning_rate(step: int, config: CloningConfig) -> float:
    """Linear warm-up, then half a cosine down to 0 at `config.steps`."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(policy: Policy, config: CloningConfig) -> torch.optim.AdamW:
    """AdamW, fused, with decay on matrices only."""
    matrices = [p for p in policy.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in policy.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
