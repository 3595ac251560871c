"""A plain multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

from torch import nn

from flowsteer.policies.choices import pick
from flowsteer.policies.errors import PolicyError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@final
class MLP(nn.Sequential):
    """[..., sizes[0]] -> [..., sizes[-1]]; the last layer is linear.

    Args:
        sizes: widths of input, hidden layers and output.
        activation: a name in `ACTIVATIONS`.
        layer_norm: normalise the hidden layers before their activation.
        dropout: share of hidden units dropped while training.

    Raises:
        PolicyError: fewer than two sizes, a size that is not positive, or an unknown activation.
    """

    def __init__(
        self, sizes: Sequence[int], activation: str = "silu", layer_norm: bool = False, dropout: float = 0.0
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise PolicyError(f"a perceptron needs input and output sizes of at least 1, got {list(sizes)}")
        activate = pick(ACTIVATIONS, activation, "activation")
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes[:-1]):
            layers.append(nn.Linear(width_in, width_out))
            layers += [nn.LayerNorm(width_out)] if layer_norm else []
            layers.append(activate())
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
