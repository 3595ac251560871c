"""Continuous time in [0, 1] as a vector that a network can use."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from flowsteer.policies.errors import PolicyError

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Shortest and longest wave for times in [0, 1] (pi0, Black et al. 2024): the longest tells 0 from 1."""


@final
class Sinusoids(nn.Module):
    """t [N] -> [N, width]: cosines, then sines of t at `width / 2` geometrically spaced periods, shortest first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise PolicyError(f"the width of a time embedding must be even and at least 4, got {width}")
        periods = torch.logspace(math.log10(MIN_PERIOD), math.log10(MAX_PERIOD), width // 2, dtype=torch.float64)
        self.register_buffer("rates", (2 * math.pi / periods).float(), persistent=False)

    rates: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """Times [N] -> [N, width]."""
        # An elementwise product, since autocast would round a matrix product's 1570 rad by several turns.
        angles = t[:, None] * self.rates
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@final
class TimeEmbedding(nn.Sequential):
    """t [N] -> [N, width]: sinusoids and a two-layer perceptron, activated at its end."""

    def __init__(self, width: int, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__(
            Sinusoids(width), nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width), activation()
        )
