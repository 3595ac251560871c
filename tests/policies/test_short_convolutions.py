"""Products in the place of convolutions: the same numbers, whatever the kernel, stride and padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flowsteer.policies.networks.unet1d import ConditionalUnet1d
from flowsteer.policies.short_convolutions import OverlappingSums, Windows, with_products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0), (4, 3, 0)])
def test_windows_are_the_convolution(kernel: int, stride: int, padding: int, bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv1d(3, 7, kernel, stride, padding, bias=bias)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(Windows(convolution)(x), convolution(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding", "longer"), [(4, 2, 1, 0), (3, 1, 0, 0), (3, 2, 1, 1)])
def test_overlapping_sums_are_the_transposed_convolution(
    kernel: int, stride: int, padding: int, longer: int, bias: bool
) -> None:
    torch.manual_seed(0)
    convolution = nn.ConvTranspose1d(3, 7, kernel, stride, padding, longer, bias=bias)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(OverlappingSums(convolution)(x), convolution(x))


def test_a_network_with_products_is_the_same_network() -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1d(2, 8, 1, 3, widths=(16, 32))
    nn.init.normal_(network.output[-1].weight)
    changed = copy.deepcopy(network)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    assert with_products(changed) == len(convolutions) > 10
    assert not any(isinstance(m, nn.Conv1d | nn.ConvTranspose1d) for m in changed.modules())
    x, t, features = torch.randn(4, 8, 2), torch.rand(4), torch.randn(4, 1, 3)
    one, other = (net(x, net.embed_time(t), net.embed_observation(features)) for net in (network, changed))
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


def test_what_does_not_learn_does_not_learn_as_a_product() -> None:
    for learns in (True, False):
        holder = nn.Sequential(nn.Conv1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)).requires_grad_(learns)
        with_products(holder)
        assert all(parameter.requires_grad == learns for parameter in holder.parameters())


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv1d(4, 4, 3, groups=2),
        nn.Conv1d(4, 4, 3, dilation=2),
        nn.Conv1d(4, 4, 3, padding="same"),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose1d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3),
    ],
)
def test_what_is_more_than_a_product_stays(convolution: nn.Module) -> None:
    holder = nn.Sequential(convolution)
    assert with_products(holder) == 0
    assert holder[0] is convolution
