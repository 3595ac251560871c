"""Convolutions over few steps as matrix products, which a processor finishes in half the time."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn import functional


def with_products(module: nn.Module) -> int:
    """Put matrix products in the place of all convolutions over one dimension within `module`; says of how many."""
    changed = 0
    for name, child in module.named_children():
        product = next((kind(child) for kind in KINDS if kind.takes(child)), None)
        if product is None:
            changed += with_products(child)
        else:
            setattr(module, name, product)
            changed += 1
    return changed


def _plain(module: nn.Conv1d | nn.ConvTranspose1d) -> bool:
    """Whether it pads with as many zeros as it says, and mixes all channels of neighbouring steps."""
    return module.groups == 1 and module.dilation == (1,) and module.padding_mode == "zeros"


@final
class Windows(nn.Module):
    """An `nn.Conv1d`: each window of steps times the same matrix."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        assert isinstance(convolution, nn.Conv1d)
        (self.kernel,), (self.stride,) = convolution.kernel_size, convolution.stride
        assert not isinstance(convolution.padding, str)
        (self.padding,) = convolution.padding
        self.weight, self.bias = nn.Parameter(convolution.weight.flatten(1)), convolution.bias

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether it can stand for `module`."""
        return isinstance(module, nn.Conv1d) and _plain(module) and not isinstance(module.padding, str)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        windows = functional.pad(x, (self.padding, self.padding)).unfold(2, self.kernel, self.stride)
        return functional.linear(windows.transpose(1, 2).flatten(2), self.weight, self.bias).transpose(1, 2)


@final
class OverlappingSums(nn.Module):
    """An `nn.ConvTranspose1d`: each step times a matrix, and what falls on the same step is added."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        assert isinstance(convolution, nn.ConvTranspose1d)
        (self.kernel,), (self.stride,) = convolution.kernel_size, convolution.stride
        assert not isinstance(convolution.padding, str)
        (self.padding,), (self.longer,) = convolution.padding, convolution.output_padding
        self.weight, self.bias = nn.Parameter(convolution.weight.flatten(1).t().contiguous()), convolution.bias

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether it can stand for `module`."""
        return isinstance(module, nn.ConvTranspose1d) and _plain(module)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        parts = functional.linear(x.transpose(1, 2), self.weight).transpose(1, 2)
        length = (x.shape[2] - 1) * self.stride - 2 * self.padding + self.kernel + self.longer
        one_high = {"kernel_size": (1, self.kernel), "stride": (1, self.stride), "padding": (0, self.padding)}
        out = functional.fold(parts, (1, length), **one_high).squeeze(2)
        return out if self.bias is None else out + self.bias[:, None]


KINDS = (Windows, OverlappingSums)
