from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowsteer.policies.build import build
from flowsteer.policies.denoising import FlowPolicy
from flowsteer.policies.encoders.base import Encoder
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.multi_modal import MultiModal
from flowsteer.policies.encoders.point_cloud import PointCloud
from flowsteer.policies.encoders.resnet import ResNet18
from flowsteer.policies.encoders.vit import SmallViT
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.spec import ArraySpec, PolicySpec

B, TO = 3, 2
IMAGE, POINTS = ArraySpec((40, 48, 3), "uint8"), ArraySpec((10, 6))
EVERYTHING = {"joints": ArraySpec((4,)), "front": IMAGE, "cloud": POINTS, "wrist": IMAGE, "pose": ArraySpec((2, 3))}
VIT = partial(SmallViT, embed_dim=16, heads=2, features=5)
CAMERAS = partial(Cameras, backbone=VIT)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def observe(specs: Mapping[str, ArraySpec], batch: int = B) -> dict[str, Tensor]:
    draw: dict[str, Callable[..., Tensor]] = {
        "uint8": partial(torch.randint, 256, dtype=torch.uint8),
        "float32": torch.randn,
    }
    return {key: draw[array.dtype](size=(batch, TO, *array.shape)) for key, array in specs.items()}


def unit_statistics(width: int) -> Any:
    ones = np.ones(width)
    return SimpleNamespace(min=-ones, max=ones, mean=0 * ones, std=ones)


def only(*keys: str) -> dict[str, ArraySpec]:
    return {key: EVERYTHING[key] for key in keys}


ENCODERS: dict[str, tuple[Callable[..., Encoder], dict[str, ArraySpec], int]] = {
    "low_dim": (LowDim, only("joints", "pose"), 10),
    "low_dim_mlp": (partial(LowDim, hidden=[8, 7]), only("joints", "pose"), 7),
    "camera": (CAMERAS, only("front"), 5),
    "cameras": (CAMERAS, only("front", "wrist"), 10),
    "cameras_shared": (partial(CAMERAS, shared=True), only("front", "wrist"), 10),
    "cameras_resnet": (
        partial(Cameras, backbone=partial(ResNet18, base_channels=16), brightness=0.2),
        only("front"),
        64,
    ),
    "points": (partial(PointCloud, hidden=(8, 16), features=9), only("cloud"), 9),
    "everything": (partial(MultiModal, images=CAMERAS, point_keys=["cloud"]), EVERYTHING, 10 + 64 + 10),
    "state_only": (MultiModal, only("joints"), 4),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_features_shapes_gradients_and_rows(name: str) -> None:
    make, specs, width = ENCODERS[name]
    encoder, obs = make(specs), observe(specs)
    features = encoder(obs)
    assert features.shape == (B, TO, encoder.feature_dim) == (B, TO, width)
    assert features.dtype == torch.float32
    if list(encoder.parameters()):
        features.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []

    encoder.eval()
    together = encoder(obs)
    assert torch.equal(encoder(obs), together)
    for i in range(B):
        single = encoder({key: value[i : i + 1] for key, value in obs.items()})
        torch.testing.assert_close(single, together[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_is_encoded_alone(name: str) -> None:
    make, specs, _ = ENCODERS[name]
    encoder, obs = make(specs).eval(), observe(specs)
    last = encoder({key: value[:, 1:] for key, value in obs.items()})
    torch.testing.assert_close(encoder(obs)[:, 1:], last, rtol=0, atol=1e-5)


def test_low_dim_concatenates_in_the_order_of_the_specs() -> None:
    obs = {"b": torch.tensor([[[1.0, 2.0]]]), "a": torch.tensor([[[[3.0], [4.0]]]])}
    specs = {"a": ArraySpec((2, 1)), "b": ArraySpec((2,))}
    assert LowDim(specs)(obs).tolist() == [[[3, 4, 1, 2]]]


def test_noise_on_low_dim_has_its_std_in_training_and_is_none_in_evaluation() -> None:
    encoder = LowDim(only("joints", "pose"), noise=0.3)
    obs = observe(only("joints", "pose"), batch=2000)
    plain = LowDim(only("joints", "pose"))(obs)
    noise = encoder(obs) - plain
    # 40000 numbers: the standard error of the mean is 0.0015, that of the standard deviation 0.0011.
    assert noise.mean().item() == pytest.approx(0, abs=0.006)
    assert noise.std().item() == pytest.approx(0.3, abs=0.005)
    assert noise.std(dim=0).min() > 0.25, "every element of every step has its own noise"
    assert not torch.equal(encoder(obs), encoder(obs))
    assert torch.equal(encoder.eval()(obs), plain)


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_noise_on_low_dim_cannot_be_negative(noise: float) -> None:
    with pytest.raises(PolicyError, match=f"policy.encoder.noise must not be negative, got {noise:g}"):
        LowDim(only("joints"), noise=noise)


def test_a_policy_leaves_point_clouds_as_they_are_unless_told_otherwise() -> None:
    observations = {"cloud": ArraySpec((10, 3)), "joints": ArraySpec((3,))}
    encoder = partial(MultiModal, point_keys=["cloud"])
    spec = PolicySpec(observations, 2, 2, 8, 4, 10.0)
    assert GaussianPolicy(spec, encoder).normalizers == {"cloud": "identity"}
    told = GaussianPolicy(spec, encoder, normalizers={"cloud": "min_max", "joints": "mean_std"})
    assert told.normalizers == {"cloud": "min_max", "joints": "mean_std"}


def test_point_order_and_doubles_mean_nothing() -> None:
    encoder, obs = PointCloud(only("cloud")), observe(only("cloud"))
    shuffled = {"cloud": obs["cloud"][:, :, torch.randperm(10)]}
    doubled = {"cloud": torch.cat([obs["cloud"], obs["cloud"][:, :, :3]], dim=2)}
    torch.testing.assert_close(encoder(shuffled), encoder(obs))
    torch.testing.assert_close(encoder(doubled), encoder(obs))


def test_a_shared_backbone_reads_all_cameras_alike() -> None:
    obs = observe(only("front", "wrist"))
    same = {"front": obs["front"], "wrist": obs["front"]}
    shared, own = (CAMERAS(only("front", "wrist"), shared=shared).eval() for shared in (True, False))
    torch.testing.assert_close(*shared(same).chunk(2, dim=2))
    assert not torch.allclose(*own(same).chunk(2, dim=2))
    assert len(own.state_dict()) == 2 * len(shared.state_dict())
    torch.testing.assert_close(shared(obs)[..., 5:], shared({"front": obs["wrist"], "wrist": obs["wrist"]})[..., 5:])


def test_cameras_may_differ_in_shape() -> None:
    specs = {"front": IMAGE, "depth": ArraySpec((64, 32, 1), "uint8")}
    assert CAMERAS(specs)(observe(specs)).shape == (B, TO, 10)


def test_random_crops_act_in_training_only() -> None:
    encoder, obs = CAMERAS(only("front")), observe(only("front"))
    assert not torch.equal(encoder(obs), encoder(obs))
    encoder.eval()
    assert torch.equal(encoder(obs), encoder(obs))


def test_multi_modal_puts_its_parts_side_by_side() -> None:
    encoder = MultiModal(EVERYTHING, images=CAMERAS, point_keys=["cloud"]).eval()
    obs = observe(EVERYTHING)
    parts = [encoder.encoders[kind](obs) for kind in ("images", "points", "state")]
    assert torch.equal(encoder(obs), torch.cat(parts, dim=2))
    assert torch.equal(parts[2], torch.cat([obs["joints"], obs["pose"].flatten(2)], dim=2))


def test_an_encoder_is_built_from_a_config() -> None:
    room = "flowsteer.policies.encoders"
    config: dict[str, Any] = {
        "_target_": f"{room}.multi_modal.MultiModal",
        "images": {
            "_target_": f"{room}.cameras.Cameras",
            "_partial_": True,
            "backbone": {"_target_": f"{room}.vit.SmallViT", "_partial_": True, "features": 3},
            "shared": True,
        },
        "state": {"_target_": f"{room}.low_dim.LowDim", "_partial_": True, "hidden": [4]},
    }
    specs = only("front", "wrist", "joints")
    assert build(config, observations=specs)(observe(specs)).shape == (B, TO, 3 + 3 + 4)


def test_a_policy_learns_and_acts_from_images() -> None:
    spec = PolicySpec(only("front", "joints"), 2, TO, 8, 4, 10.0)
    policy = FlowPolicy(spec, partial(MultiModal, images=CAMERAS), partial(ResidualMLP, hidden=32, blocks=1))
    policy.fit_normalizer({"joints": unit_statistics(4), "action": unit_statistics(2)})
    obs = observe(spec.observations)
    batch = {"obs": obs, "action": torch.randn(B, 8, 2)}
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        policy.loss(batch).total.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in policy.encoder.parameters())
    assert policy.eval().act(obs).shape == (B, 4, 2)


@pytest.mark.parametrize(("make", "specs", "message"), [
    (LowDim, only("joints", "front"), "observation 'front' is an image; use the encoder MultiModal instead of LowDim"),
    (LowDim, {}, "LowDim was given no observation"),
    (Cameras, {}, "Cameras was given no image"),
    (Cameras, only("front", "joints"), "observation 'joints' must be a uint8 image (H, W, C), got float32 (4,)"),
    (Cameras, {"flat": ArraySpec((40, 48), "uint8")}, "observation 'flat' must be a uint8 image"),
    (Cameras, {"tiny": ArraySpec((32, 32, 3), "uint8")}, "observation 'tiny': ResNet18 needs images of more than 32"),
    (
        partial(Cameras, shared=True),
        {"front": IMAGE, "wrist": ArraySpec((40, 40, 3), "uint8")},
        "observation 'wrist' is (40, 40, 3) and 'front' (40, 48, 3): a shared backbone needs images of one shape",
    ),
    (PointCloud, only("joints"), "observation 'joints' must be a float point cloud (P, C) with C >= 3, got float32"),
    (PointCloud, {"flat": ArraySpec((10, 2))}, "observation 'flat' must be a float point cloud"),
    (partial(PointCloud, hidden=()), only("cloud"), "at least one observation and one hidden width"),
    (
        partial(MultiModal, point_keys=["lidar"]),
        only("cloud", "joints"),
        "point_keys names 'lidar', the observations are ['cloud', 'joints']",
    ),
    (partial(MultiModal, point_keys=["pose"]), {"pose": ArraySpec((4,))}, "observation 'pose' must be a float point"),
])  # fmt: skip
def test_observations_that_cannot_be_read_are_refused(
    make: Callable[..., Encoder], specs: dict[str, ArraySpec], message: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        make(specs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
