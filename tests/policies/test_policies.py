"""What every family promises, and what the denoising families promise beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from flowsteer.policies.denoising import DenoisingPolicy, FlowPolicy
from flowsteer.policies.encoders.cameras import Cameras
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.encoders.vit import SmallViT
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.gaussian import GaussianPolicy
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.paths import TARGET, LinearPath
from flowsteer.policies.policy import Policy
from flowsteer.policies.samplers import uniform_grid
from flowsteer.policies.spec import ArraySpec, PolicySpec

Make = Callable[..., Policy]
OBS = {"state": torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))}


def trained(policy: Policy) -> Policy:
    """Weights that are nowhere zero, as after training."""
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return policy.eval()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_same_seed_same_chunk(family: str, make_policy: Make) -> None:
    policy = trained(make_policy(family))
    first, second = (policy.act(OBS, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (6, 4, 2)
    assert first.isfinite().all()


def test_batched_rows_equal_single_rows(family: str, make_policy: Make) -> None:
    policy = trained(make_policy(family))
    rows = policy.predict(OBS, generator=[generator(i) for i in range(6)])
    for i in range(6):
        alone = policy.predict({"state": OBS["state"][i : i + 1]}, generator=generator(i))
        torch.testing.assert_close(rows[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_act_is_the_executed_part_of_predict(family: str, make_policy: Make) -> None:
    policy = trained(make_policy(family))
    chunk = policy.predict(OBS, generator=generator(3))
    assert chunk.shape == (6, 8, 2)
    assert torch.equal(policy.act(OBS, generator=generator(3)), chunk[:, 1:5])


def test_loss_has_parts_and_gradients(family: str, make_policy: Make, make_batch: Callable[..., Any]) -> None:
    policy = trained(make_policy(family))
    loss = policy.loss(make_batch(16))
    loss.total.backward()
    assert loss.total.item() > 0
    assert loss.parts
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_given_draws_make_the_loss_deterministic(
    family: str, make_policy: Make, make_batch: Callable[..., Any]
) -> None:
    policy = trained(make_policy(family))
    draws, batch = policy.draw(16, generator(0)), make_batch(16)
    assert torch.equal(policy.loss(batch, draws).total, policy.loss(batch, draws).total)


def test_missing_and_misshapen_observations(family: str, make_policy: Make) -> None:
    policy = make_policy(family)
    with pytest.raises(PolicyError, match=r"observation 'state' is missing; got \['stat'\]"):
        policy.act({"stat": OBS["state"]})
    with pytest.raises(PolicyError, match=r"observation 'state' must have shape \[B, 2, 3\], got \[6, 1, 3\]"):
        policy.act({"state": OBS["state"][:, :1]})


def test_noise_of_another_shape(family: str, make_policy: Make) -> None:
    with pytest.raises(PolicyError, match=r"noise must have shape \[6, 8, 2\], got \[6, 4, 2\]"):
        make_policy(family).act(OBS, noise=torch.zeros(6, 4, 2))


def test_images_of_floats_are_refused() -> None:
    """They would be taken for 0..255 and divided once more, in silence."""
    spec = PolicySpec({"front": ArraySpec((24, 24, 3), "uint8")}, 2, 2, 8, 4, 10.0)
    encoder = partial(Cameras, backbone=partial(SmallViT, embed_dim=16, heads=2, features=5))
    policy = GaussianPolicy(spec, encoder, hidden=(8,))
    image = torch.randint(256, (1, 2, 24, 24, 3), dtype=torch.uint8)
    assert policy.features({"front": image}).shape == (1, 2, 5)
    with pytest.raises(PolicyError, match=r"observation 'front' must be uint8 \(0 to 255\), got torch.float32"):
        policy.features({"front": image / 255})


@pytest.mark.parametrize("family", ["diffusion", "flow"], indirect=True)
def test_eta_zero_maps_noise_to_chunk(family: str, make_policy: Make) -> None:
    policy = trained(make_policy(family))
    noise = torch.randn(6, 8, 2, generator=generator(0))
    chunks = [policy.predict(OBS, noise=noise, generator=generator(seed)) for seed in (1, 2)]
    assert torch.equal(*chunks)
    assert not torch.equal(chunks[0], policy.predict(OBS, noise=-noise))


@pytest.mark.parametrize("family", ["diffusion", "flow"], indirect=True)
def test_eta_one_draws_noise_at_each_step(family: str, make_policy: Make) -> None:
    policy = trained(make_policy(family))
    assert isinstance(policy, DenoisingPolicy)
    policy.eta = 1.0
    noise = torch.zeros(6, 8, 2)
    a, b = (policy.predict(OBS, noise=noise, generator=generator(seed)) for seed in (1, 2))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("family", ["diffusion", "flow"], indirect=True)
def test_denoise_on_a_grid_equals_denoise(family: str, make_policy: Make) -> None:
    policy = trained(make_policy(family))
    assert isinstance(policy, DenoisingPolicy)
    grid, x = uniform_grid(5), torch.randn(6, 8, 2, generator=generator(0))
    cond = policy.encode(OBS)
    on_grid = policy.denoise_on(grid, cond)
    for k in range(5):
        expected = policy.denoise(x, grid[k].expand(6), cond)
        torch.testing.assert_close(on_grid(x, k), expected, atol=1e-5, rtol=1e-5)
        assert expected.abs().max() <= 1, "a_hat is clipped to the normalised range"


def test_flow_loss_by_hand(make_policy: Make) -> None:
    policy = trained(make_policy("flow"))
    assert isinstance(policy, FlowPolicy)
    a, eps = torch.randn(2, 3, 8, 2, generator=generator(0))
    t, cond = torch.tensor([0.1, 0.5, 0.9]), policy.encode({"state": OBS["state"][:3]})
    out = policy.network((1 - t)[:, None, None] * a + t[:, None, None] * eps, policy.network.embed_time(t), cond)
    expected = (out - (eps - a)).square().mean((1, 2))
    torch.testing.assert_close(policy.denoising_loss(a, cond, t, eps), expected)
    torch.testing.assert_close(TARGET["velocity"](LinearPath(), a, eps, t), eps - a)


@pytest.mark.parametrize("family", ["diffusion", "flow"], indirect=True)
def test_training_times_cover_the_path_evenly(family: str, make_policy: Make) -> None:
    t, eps = make_policy(family).draw(1000, generator(0))
    assert t.min() > 0
    assert t.max() <= 1
    # The comb puts exactly one time into each of the 1000 cells.
    assert t.sort().values.diff().max() < 2.1e-3
    assert eps.shape == (1000, 8, 2)
    assert eps.std().item() == pytest.approx(1, abs=0.02)


def test_gaussian_by_hand(make_policy: Make, make_batch: Callable[..., Any]) -> None:
    policy, batch = trained(make_policy("gaussian")), make_batch(16)
    assert isinstance(policy, GaussianPolicy)
    gaussian = policy.distribution(policy.features(batch["obs"]))
    action = policy.normalizer.normalize("action", batch["action"])
    normal = torch.distributions.Normal(gaussian.mean, gaussian.std)
    torch.testing.assert_close(policy.loss(batch).total, -normal.log_prob(action).mean())
    assert torch.equal(policy.act(OBS), policy.act(OBS)), "temperature 0 acts with the mean"
    policy.temperature = 1.0
    assert not torch.equal(policy.act(OBS), policy.act(OBS))


def test_gaussian_std_has_a_floor(make_policy: Make) -> None:
    policy = make_policy("gaussian")
    assert isinstance(policy, GaussianPolicy)
    policy.log_std.data.fill_(-100.0)
    assert policy.distribution(policy.features(OBS)).std.tolist() == pytest.approx([0.01, 0.01])


def test_spec_round_trip_and_refusals() -> None:
    spec = PolicySpec({"image": ArraySpec((96, 96, 3), "uint8")}, 2, 2, 16, 8, 10.0)
    assert PolicySpec.from_dict(spec.to_dict()) == spec
    assert spec.executed == slice(1, 9)
    with pytest.raises(PolicyError, match="must not exceed prediction_steps, got 2 - 1 \\+ 16 > 16"):
        PolicySpec({"x": ArraySpec((1,))}, 2, 2, 16, 16, 10.0)
    with pytest.raises(PolicyError, match=r"^action_dim must be at least 1, got 0$"):
        PolicySpec({"x": ArraySpec((1,))}, 0, 2, 16, 8, 10.0)
    with pytest.raises(PolicyError, match=r"^execution_steps must be at least 1, got -1$"):
        PolicySpec({"x": ArraySpec((1,))}, 2, 2, 16, -1, 10.0)
    with pytest.raises(PolicyError, match=r"^a policy needs at least one observation$"):
        PolicySpec({}, 2, 2, 16, 8, 10.0)
    with pytest.raises(PolicyError, match="control_hz must be positive, got 0"):
        PolicySpec({"x": ArraySpec((1,))}, 2, 2, 16, 8, 0.0)


def test_discrete_dimensions_are_named_in_the_spec() -> None:
    spec = PolicySpec({"x": ArraySpec((3,))}, 7, 1, 4, 4, 10.0, discrete=(6,), discrete_scale=0.1)
    stored = spec.to_dict()
    assert (stored["discrete"], stored["discrete_scale"]) == ([6], 0.1)
    assert PolicySpec.from_dict(stored) == spec
    # As checkpoints of earlier versions store it.
    del stored["discrete"], stored["discrete_scale"]
    assert PolicySpec.from_dict(stored) == replace(spec, discrete=(), discrete_scale=1.0)
    for dims in ((7,), (-1,), (6, 6)):
        with pytest.raises(PolicyError, match=r"discrete=.* must name different dimensions from 0 to 6"):
            replace(spec, discrete=dims)
    for scale in (0.0, 1.5):
        with pytest.raises(PolicyError, match=rf"discrete_scale must be in \(0, 1\], got {scale:g}"):
            replace(spec, discrete_scale=scale)


def test_a_gripper_is_two_values_to_the_network(make_statistics: Callable[..., Any]) -> None:
    spec = replace(WITH_POSITION, discrete=(2,), discrete_scale=0.1)
    policy = FlowPolicy(spec, LowDim, partial(ResidualMLP, hidden=8), normalizers={"action": "mean_std"}, clip=None)
    actions = torch.tensor([[0.0, 1.0, -1.0], [2.0, 3.0, 1.0], [4.0, 5.0, 1.0]])
    policy.fit_normalizer(make_statistics(position=torch.randn(5, 2), goal=torch.randn(5, 4), action=actions))
    assert policy.normalizer.normalize("action", actions)[:, 2].tolist() == pytest.approx([-0.1, 0.1, 0.1])
    with pytest.raises(PolicyError, match=r"relative_to=position covers the first 2 .* of which discrete=\[1\] names"):
        FlowPolicy(replace(spec, discrete=(1,)), LowDim, ResidualMLP, relative_to="position")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_std": 0.0}, "policy.min_std must be positive, got 0"),
        ({"temperature": -1.0}, "policy.temperature must not be negative, got -1"),
    ],
)
def test_gaussian_refuses_impossible_scales(options: dict[str, float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        GaussianPolicy(PolicySpec({"x": ArraySpec((3,))}, 2, 1, 4, 4, 10.0), LowDim, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("observations", "action_dim", "hz", "message"),
    [
        ({"y": ArraySpec((3,))}, 2, 10.0, r"needs observation 'x', task t offers \['y'\]"),
        ({"x": ArraySpec((4,))}, 2, 10.0, r"observation 'x': the policy needs .*\(3,\).*, task t offers .*\(4,\)"),
        ({"x": ArraySpec((3,))}, 7, 10.0, "the policy has 2 action dimensions, task t has 7"),
        ({"x": ArraySpec((3,))}, 2, 20.0, "the policy runs at 10 Hz, task t at 20 Hz"),
    ],
)
def test_a_policy_refuses_another_task(
    observations: dict[str, ArraySpec], action_dim: int, hz: float, message: str
) -> None:
    spec = PolicySpec({"x": ArraySpec((3,))}, 2, 1, 4, 4, 10.0)
    spec.check({"x": ArraySpec((3,)), "more": ArraySpec((1,))}, 2, 10.0, "task t")
    with pytest.raises(PolicyError, match=message):
        spec.check(observations, action_dim, hz, "task t")


WITH_POSITION = PolicySpec({"position": ArraySpec((2,)), "goal": ArraySpec((4,))}, 3, 2, 8, 4, 10.0)


def relative_policy(**options: Any) -> FlowPolicy:
    return FlowPolicy(WITH_POSITION, LowDim, partial(ResidualMLP, hidden=16), relative_to="position", **options)


def fit_to_identity(policy: Policy) -> None:
    for name, buffer in policy.normalizer.named_buffers():
        buffer.fill_(1.0 if name.startswith("scale") else 0.0)


def test_relative_actions_by_hand() -> None:
    policy = relative_policy()
    fit_to_identity(policy)
    position = torch.tensor([[[9.0, 9.0], [1.0, 2.0]]])
    action = torch.tensor([[[1.5, 2.5, 0.7], [3.0, 0.0, -0.7]]])
    # Relative to the last of the observed steps; the third channel (a gripper, say) has nothing that it is relative to.
    relative = policy.relative(action, {"position": position})
    assert relative.tolist() == [[[0.5, 0.5, pytest.approx(0.7)], [2.0, -2.0, pytest.approx(-0.7)]]]
    torch.testing.assert_close(policy.physical(relative, {"position": position}), action)


def test_a_relative_policy_moves_with_what_it_is_relative_to() -> None:
    policy = trained(relative_policy(clip=None, normalizers={"action": "mean_std"}))
    fit_to_identity(policy)
    obs = {"position": torch.randn(4, 2, 2), "goal": torch.randn(4, 2, 4)}
    noise = torch.randn(4, 8, 3)
    sampled = policy.predict(obs, noise=noise)
    inside = policy.relative(sampled, obs)
    absolute = FlowPolicy(
        WITH_POSITION, LowDim, partial(ResidualMLP, hidden=16), clip=None, normalizers={"action": "mean_std"}
    ).eval()
    absolute.load_state_dict(policy.state_dict())
    torch.testing.assert_close(absolute.predict(obs, noise=noise), inside, atol=1e-5, rtol=1e-5)
    assert (sampled - inside)[..., :2].abs().max() > 0.1


def test_relative_actions_learn_from_absolute_demonstrations() -> None:
    policy, plain = (
        FlowPolicy(WITH_POSITION, LowDim, partial(ResidualMLP, hidden=16), relative_to=to) for to in ("position", None)
    )
    plain.load_state_dict(policy.state_dict())
    for each in (policy, plain):
        fit_to_identity(each)
    obs = {"position": torch.randn(4, 2, 2), "goal": torch.randn(4, 2, 4)}
    action, draws = torch.randn(4, 8, 3), policy.draw(4, generator(0))
    shifted = policy.relative(action, obs)
    told = policy.loss({"obs": obs, "action": action}, draws).total
    torch.testing.assert_close(told, plain.loss({"obs": obs, "action": shifted}, draws).total)


@pytest.mark.parametrize("key", ["goal", "nothing"])
def test_actions_are_relative_to_what_is_observed_and_no_wider(key: str) -> None:
    with pytest.raises(PolicyError) as error:
        FlowPolicy(WITH_POSITION, LowDim, partial(ResidualMLP, hidden=16), relative_to=key)
    assert str(error.value) == (
        f"policy.relative_to={key} is no observation of at most 3 numbers, as wide as the action; fitting: position"
    )
