"""Convolutions over few steps as matrix products, which a processor finishes sooner."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional


def with_products(module: nn.Module) -> int:
    """Put matrix products in the place of the plain convolutions over one dimension in `module`; says of how many."""
    changed = 0
    for name, child in module.named_children():
        if _plain(child):
            setattr(module, name, PRODUCTS[type(child)](child))
            changed += 1
        else:
            changed += with_products(child)
    return changed


def _plain(module: Any) -> bool:
    """Whether it pads with as many zeros as it says, and mixes all channels of neighbouring steps."""
    return (
        type(module) in PRODUCTS
        and module.groups == 1
        and module.dilation == (1,)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


@final
class Windows(nn.Module):
    """A plain `nn.Conv1d`: each window of steps times the same matrix."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        (self.kernel,), (self.stride,), (self.padding,) = (
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
        )
        self.product = _linear(convolution.weight.flatten(1), convolution)
        if convolution.bias is not None:
            self.product.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        windows = functional.pad(x, (self.padding, self.padding)).unfold(2, self.kernel, self.stride)
        out: Tensor = self.product(windows.transpose(1, 2).flatten(2))
        return out.transpose(1, 2)


@final
class OverlappingSums(nn.Module):
    """A plain `nn.ConvTranspose1d`: each step times a matrix, and what falls on the same step is added."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        (self.kernel,), (self.stride,) = convolution.kernel_size, convolution.stride
        (self.padding,), (self.longer,) = convolution.padding, convolution.output_padding
        self.product = _linear(convolution.weight.flatten(1).t().contiguous(), convolution)
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        parts = self.product(x.transpose(1, 2)).transpose(1, 2)
        length = (x.shape[2] - 1) * self.stride - 2 * self.padding + self.kernel + self.longer
        one_high = {"kernel_size": (1, self.kernel), "stride": (1, self.stride), "padding": (0, self.padding)}
        out = functional.fold(parts, (1, length), **one_high).squeeze(2)
        return out if self.bias is None else out + self.bias[:, None]


def _linear(weight: Tensor, convolution: Any) -> nn.Linear:
    """Without a bias; it learns where the convolution does."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=convolution.weight.requires_grad)
    return linear


PRODUCTS: dict[type[nn.Module], type[Windows | OverlappingSums]] = {
    nn.Conv1d: Windows,
    nn.ConvTranspose1d: OverlappingSums,
}
