from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from flowsteer.policies.encoders.backbone import Backbone
from flowsteer.policies.encoders.resnet import ResNet18, SpatialSoftmax
from flowsteer.policies.encoders.vit import SmallViT, SpatialEmbedding, patches
from flowsteer.policies.errors import PolicyError

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet": partial(ResNet18, base_channels=16, keypoints=4, features=6),
    "vit": partial(SmallViT, embed_dim=16, layers=2, heads=2, features=6),
}


@pytest.fixture(params=BACKBONES)
def make(request: pytest.FixtureRequest) -> Callable[..., Backbone]:
    torch.manual_seed(0)
    return BACKBONES[request.param]


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 96, 96), (1, 40, 64), (4, 75, 33)])
def test_features_have_the_promised_width(
    make: Callable[..., Backbone], channels: int, height: int, width: int
) -> None:
    net = make(channels, height, width)
    assert net(torch.randn(2, channels, height, width)).shape == (2, net.feature_dim) == (2, 6)


def test_gradients_reach_every_parameter(make: Callable[..., Backbone]) -> None:
    net = make(3, 48, 48)
    net(torch.randn(4, 3, 48, 48)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_batched_images_equal_single_ones(make: Callable[..., Backbone]) -> None:
    net, images = make(3, 48, 48), torch.randn(3, 3, 48, 48)
    single = torch.cat([net(image) for image in images.split(1)])
    torch.testing.assert_close(net(images), single, rtol=0, atol=1e-5)


def test_bfloat16_autocast_stays_finite(make: Callable[..., Backbone]) -> None:
    net, images = make(3, 48, 48), torch.rand(2, 3, 48, 48) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(images)
    assert rough.isfinite().all()
    torch.testing.assert_close(rough.float(), net(images), rtol=0.1, atol=0.1)


def test_resnet_has_the_published_weights() -> None:
    net = ResNet18(3, 96, 96)
    # Without its classifier a ResNet-18 has 11,176,512 weights; GroupNorm has as many as BatchNorm.
    assert count(net.stem, net.stages) == 11_176_512
    assert count(net.keypoints, net.output) == (512 * 32 + 32) + (64 * 64 + 64)


@pytest.mark.parametrize(("pixels", "expected"), [(96, 3), (84, 3), (224, 7), (33, 2)])
def test_resnet_maps_have_a_step_every_32_pixels(pixels: int, expected: int) -> None:
    net = ResNet18(3, pixels, pixels, base_channels=16)
    assert net.stages(net.stem(torch.zeros(1, 3, pixels, pixels))).shape == (1, 128, expected, expected)


def test_spatial_softmax_finds_a_bright_pixel() -> None:
    maps = torch.zeros(1, 3, 5, 9)
    for channel, (row, column) in enumerate([(0, 0), (4, 2), (2, 8)]):
        maps[0, channel, row, column] = 50
    # Columns 0, 2, 8 of 9 are at -1, -0.5, 1; rows 0, 4, 2 of 5 at -1, 1, 0.
    assert SpatialSoftmax()(maps)[0].tolist() == pytest.approx([-1, -0.5, 1, -1, 1, 0], abs=1e-6)


def test_spatial_softmax_weighs_by_hand() -> None:
    maps = torch.tensor([math.log(3), 0.0]).reshape(1, 1, 1, 2).expand(1, 1, 2, 2)
    # Three quarters of the weight are on the left column, at x = -1; the rows weigh the same.
    assert SpatialSoftmax()(maps)[0].tolist() == pytest.approx([-0.5, 0])


def test_spatial_softmax_keeps_its_precision_under_autocast() -> None:
    maps = torch.randn(2, 4, 7, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = SpatialSoftmax()(maps)
    assert torch.equal(rough, SpatialSoftmax()(maps.float()))


@pytest.mark.parametrize(("pixels", "expected"), [(96, 11), (16, 1), (15, 0), (84, 9)])
def test_patches_of_a_side(pixels: int, expected: int) -> None:
    # 96: (96 - 8) // 4 + 1 = 23 columns after the first convolution, (23 - 3) // 2 + 1 = 11 after the second.
    assert patches(pixels) == expected


def test_spatial_embedding_by_hand() -> None:
    net, tokens = SpatialEmbedding(5, 3, 4), torch.randn(2, 5, 3)
    with torch.no_grad():
        net.channels.copy_(torch.tensor([1.0, 0.0, 2.0])[:, None].expand(3, 4))
    expected = net.places(tokens[:, :, 0]) + 2 * net.places(tokens[:, :, 2])
    torch.testing.assert_close(net(tokens), expected)


@pytest.mark.parametrize(("build", "message"), [
    (partial(ResNet18, 3, 32, 96), "ResNet18 needs images of more than 32 pixels a side after the crop, got 32 x 96"),
    (partial(ResNet18, 3, 96, 96, base_channels=24), "base_channels of ResNet18 must be a multiple of 16, got 24"),
    (partial(SmallViT, 3, 96, 15), "SmallViT needs images of at least 16 pixels a side, got 96 x 15"),
    (partial(SmallViT, 3, 96, 96, embed_dim=10, heads=4), "must be a multiple of its heads, got 10 and 4"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(build: Callable[[], Backbone], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        build()
