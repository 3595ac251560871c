"""Exponential moving average of a policy's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar, final

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@final
class Ema(Generic[Module]):
    """theta_ema <- d theta_ema + (1 - d) theta, with d = min(max_decay, 1 - (1 + n)^-power) at the n-th update.

    The warm-up of d (K. Crowson's, as in `diffusers.EMAModel`) lets the average forget the random start.

    Attributes:
        average: a copy of the module that holds the averaged weights, in evaluation mode.
        updates: number of updates so far; part of the training state.
    """

    def __init__(self, module: Module, power: float = 0.75, max_decay: float = 0.9999) -> None:
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        self.power, self.max_decay, self.updates = power, max_decay, 0

    def decay(self) -> float:
        """d of the next update."""
        return max(0.0, min(self.max_decay, 1 - float((1 + self.updates) ** -self.power)))

    @torch.no_grad()
    def update(self, module: Module) -> None:
        """Move the average towards `module`."""
        weight = 1 - self.decay()
        self.updates += 1
        torch._foreach_lerp_(list(self.average.parameters()), list(module.parameters()), weight)
