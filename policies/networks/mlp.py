"""A plain multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

from torch import nn

from flowsteer.policies.errors import PolicyError


@final
class MLP(nn.Sequential):
    """[..., sizes[0]] -> [..., sizes[-1]]; SiLU behind every layer but the last, which is linear.

    Args:
        sizes: widths of input, hidden layers and output.

    Raises:
        PolicyError: fewer than two sizes, or a size that is not positive.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise PolicyError(f"a perceptron needs input and output sizes of at least 1, got {list(sizes)}")
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
