"""A policy that descends its own energy: what it learns, how it stops, and the traps of the published code."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowsteer.policies.checkpoint import load_policy, save_checkpoint
from flowsteer.policies.compiling import compiled
from flowsteer.policies.ebt import EnergyPolicy, energy_length, gradient_length
from flowsteer.policies.ema import Ema
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.engine import compile_act
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Features, Network
from flowsteer.policies.networks.energy_transformer import EnergyTransformer
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.networks.transformer import DiffusionTransformer
from flowsteer.policies.policy import Policy
from flowsteer.policies.spec import ArraySpec, PolicySpec

SPEC = PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0)
TRANSFORMER = partial(EnergyTransformer, width=16, layers=1, heads=2)
NETWORKS = {
    "energy_transformer": TRANSFORMER,
    "mlp": partial(ResidualMLP, hidden=16, blocks=1),
    "transformer": partial(DiffusionTransformer, width=16, layers=1, heads=2),
}


class Bowl(Network):
    """E(x) = |x - c|^2 / 2 - |c|^2 / 2, where c holds the first numbers of the observation's last step."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def embed_time(self, t: Tensor) -> Features:
        return ()

    def embed_observation(self, features: Tensor) -> Features:
        return (features[:, -1:, : self.action_dim],)

    def forward(self, x: Tensor, time: Features, observation: Features) -> Tensor:
        return x / 2 - self.scale * observation[0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(network: Callable[..., Network] = TRANSFORMER, **options: Any) -> EnergyPolicy:
    """With normalisers that change nothing and weights that are nowhere zero."""
    torch.manual_seed(0)
    policy = EnergyPolicy(SPEC, LowDim, network, **options)
    for name, buffer in policy.normalizer.named_buffers():
        buffer.fill_(1.0 if name.startswith("scale") else 0.0)
    for name, parameter in policy.network.named_parameters():
        if network is not Bowl and name != "sharpness":
            parameter.data += 0.05 * torch.randn_like(parameter)
    return policy.eval()


def observed(rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {"state": torch.randn(rows, 2, 3, generator=seeded(seed))}


def make_batch(rows: int, seed: int = 0) -> dict[str, Any]:
    return {"obs": observed(rows, seed), "action": torch.randn(rows, 8, 2, generator=seeded(seed + 1))}


# What it computes


def test_energy_and_gradient_by_hand() -> None:
    policy, obs = make(Bowl), observed(3)
    c = obs["state"][:, -1:, :2].expand(3, 8, 2)
    # 16 numbers, each 0.5 off.
    above = policy.energy(obs, c + 0.5) - policy.energy(obs, c)
    torch.testing.assert_close(above, torch.full((3,), 16 * 0.5**2 / 2))
    noise = policy.references
    assert noise.shape == (16, 8, 2)
    of_noise = torch.stack([(row - noise).square().sum((1, 2)).mean() / 2 for row in c])
    torch.testing.assert_close(policy.energy(obs, c), -of_noise)
    gradient, _ = policy._gradient(c + 0.5, policy._condition(policy.features(obs)))
    torch.testing.assert_close(gradient, torch.full((3, 8, 2), 0.5))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradient_is_that_of_the_energy(network: str) -> None:
    policy = make(NETWORKS[network]).double()
    obs, x = observed(2), torch.randn(2, 8, 2, dtype=torch.float64, generator=seeded(3))
    cond = policy._condition(policy.features({"state": obs["state"].double()}))
    gradient, energy = policy._gradient(x, cond)
    step = 1e-4 * torch.randn(2, 8, 2, dtype=torch.float64, generator=seeded(4))
    with torch.no_grad():
        ahead, behind = policy._energy(x + step, cond), policy._energy(x - step, cond)
    torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum((1, 2)), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(energy, policy._energy(x, cond))


def test_nesterov_by_hand() -> None:
    # A bowl around 0, dE/dx = x. x and v are 1 and 0; y = 1 gives v = -0.25, x = 0.75; y = 0.625 gives
    # v = -0.125 - 0.15625 = -0.28125, x = 0.46875.
    policy = make(Bowl, momentum=0.5, reach=0.25, tolerance=0.0, max_steps=2)
    chunk = policy.predict({"state": torch.zeros(1, 2, 3)}, noise=torch.ones(1, 8, 2))
    torch.testing.assert_close(chunk, torch.full((1, 8, 2), 0.46875))


def test_a_step_of_training_goes_its_reach_or_all_that_is_left() -> None:
    policy = make(reach=0.25)
    action, eps = torch.zeros(2, 8, 2), torch.full((2, 8, 2), 2.0)
    # At 0.6 of the way a quarter of the whole way, at 0.1 of the way what is left.
    wanted = policy._wanted(torch.tensor([0.6, 0.1])[:, None, None] * eps, action, eps)
    torch.testing.assert_close(wanted[:, 0, 0], torch.tensor([0.5, 0.2]))
    assert not policy._wanted(action, action, eps).any(), "a demonstration is a point of rest"


def test_lengths_by_hand() -> None:
    # In the bowl x^2 / (2 alpha), a step d = x takes off x^2 / (2 alpha): both tell d.
    move, alpha = torch.full((2, 8, 2), 0.3), 0.7
    change = torch.full((2,), -16 * 0.3**2 / (2 * alpha))
    torch.testing.assert_close(gradient_length(move, alpha * change), torch.full((2,), 0.3))
    torch.testing.assert_close(energy_length(move, alpha * change), torch.full((2,), 0.3))


# What it learns


def two_ways(rows: int, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
    """Demonstrations that pass on either side, as wide and as shaky as the observation says; and one of the ways."""
    state = 2 * torch.rand(rows, 2, 3, generator=generator) - 1
    side = torch.randint(0, 2, (rows, 1, 1), generator=generator) * 2.0 - 1
    ramp = torch.linspace(0.4, 1, 8)[None, :, None]
    way = ramp * torch.cat([1 + 0.5 * state[:, -1:, :1], state[:, -1:, 1:2]], dim=2)
    shaking = 0.5 * state[:, -1:, 2:].clamp(min=0) * torch.randn(rows, 8, 2, generator=generator)
    return {"obs": {"state": state}, "action": side * way + shaking}, way


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().float()


def test_it_goes_either_way_and_not_between_and_knows_how_sure_it_is() -> None:
    """Chains that start at noise alone learn the mean of both ways, 0, which is about 0.7 off."""
    policy = make(partial(ResidualMLP, hidden=64, blocks=2), tolerance=0.05).train()
    optimizer, generator = torch.optim.AdamW(policy.parameters(), lr=3e-3), seeded(0)
    for _ in range(250):
        batch, _ = two_ways(128, generator)
        optimizer.zero_grad()
        policy.loss(batch, policy.draw(128, generator)).total.backward()
        optimizer.step()
    policy.eval()
    batch, way = two_ways(400, generator)
    obs, spread = batch["obs"], batch["obs"]["state"][:, -1, 2].clamp(min=0)
    chunk, energy, steps = policy.descend(obs, generator=generator)
    errors = torch.stack([(chunk - sign * way).square().mean((1, 2)).sqrt() for sign in (1, -1)])
    assert errors.amin(0)[spread == 0].median() < 0.15
    assert 0.35 < (errors[0] < errors[1]).float().mean() < 0.65
    assert steps.float().mean() < 10
    assert (energy < policy.energy(obs, torch.zeros_like(chunk))).float().mean() > 0.9
    assert (energy < policy.energy(obs, 1.5 * chunk)).float().mean() > 0.9
    # Where demonstrations shake, the energy is higher: across observations as well.
    assert torch.corrcoef(torch.stack([ranks(energy), ranks(spread)]))[0, 1] > 0.5
    assert policy.step_size.item() != pytest.approx(0.25)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_loss_reaches_every_weight_through_the_second_derivative(network: str) -> None:
    policy = make(NETWORKS[network]).train()
    policy.loss(make_batch(16), policy.draw(16, seeded(0))).total.backward()
    assert [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_chains_near_demonstrations_walk_and_their_last_step_learns() -> None:
    policy, batch = make(train_steps=3, step_spread=1.0, momentum=0.5), make_batch(8)
    u, eps, sizes, noises = next(d for d in (policy.draw(8, seeded(s)) for s in range(20)) if d[2].shape[1] == 3)
    loss = policy.loss(batch, (u, eps, sizes, noises)).total
    cond = policy._condition(policy.features(batch["obs"]))
    # Rows 0 and 4 start within the last quarter of the way and take two steps; the others start before it.
    t = 0.25 + 0.75 * u
    t[::4] = 0.25 * u[::4]
    x, v = torch.lerp(batch["action"], eps, t[:, None, None]), torch.zeros(8, 8, 2)
    for _ in range(2):
        v = 0.5 * v - policy.step_size.detach() * policy._gradient(x + 0.5 * v, cond)[0]
        v[[1, 2, 3, 5, 6, 7]] = 0
        x = x + v
    x = x + 0.5 * v
    move = policy.step_size * policy._gradient(x, cond, second_order=True)[0]
    by_hand = (move - policy._wanted(x, batch["action"], eps)).square().mean() / 0.25**2
    torch.testing.assert_close(loss, by_hand)
    weights = list(policy.network.parameters())
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(by_hand, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_chains_are_randomised() -> None:
    policy = make(train_steps=3, step_spread=1.5)
    draws = [policy.draw(64, seeded(seed)) for seed in range(30)]
    assert {draw[2].shape[1] for draw in draws} == {1, 2, 3}
    assert all(draw[3].shape == (64, draw[2].shape[1], 8, 2) for draw in draws)
    sizes = torch.cat([draw[2].flatten() for draw in draws])
    assert 1 / 1.5 <= sizes.min() < 0.7 < 1.45 < sizes.max() <= 1.5
    # One time in each of 64 cells.
    assert draws[0][0].sort().values.diff().max() < 2.1 / 64


def test_langevin_noise_is_of_training_alone() -> None:
    policy, batch = make(langevin=0.5), make_batch(16)
    t, eps, sizes, noises = policy.draw(16, seeded(0))
    other = (t, eps, sizes, -noises)
    assert torch.equal(policy.loss(batch, (t, eps, sizes, noises)).total, policy.loss(batch, other).total)
    policy.train()
    assert not torch.equal(policy.loss(batch, (t, eps, sizes, noises)).total, policy.loss(batch, other).total)
    chunks = [policy.predict(batch["obs"], noise=eps) for _ in range(2)]
    assert torch.equal(*chunks)


# How it stops


def distances(*rows: float) -> Tensor:
    """Starts so far from the observed 0."""
    return torch.tensor(rows)[:, None, None].expand(-1, 8, 2).clone()


@pytest.mark.parametrize("stop", ["gradient", "energy"])
def test_each_row_stops_for_itself_and_stays(stop: str) -> None:
    policy = make(Bowl, momentum=0.0, tolerance=0.05, max_steps=16, stop=stop)
    obs = {"state": torch.zeros(3, 2, 3)}
    starts = distances(0.01, 1.0, 4.0)
    chunk, _, steps = policy.descend(obs, noise=starts)
    # A step takes a quarter off. By the gradient a row rests once that quarter is below 0.05.
    if stop == "gradient":
        assert steps.tolist() == [1, 7, 12]
    assert steps[0] < steps[1] < steps[2] < 16
    assert chunk.abs().max() < 0.2
    for i in range(3):
        alone = policy.descend({"state": torch.zeros(1, 2, 3)}, noise=starts[i : i + 1])
        assert alone.steps.item() == steps[i]
        assert torch.equal(alone.chunk[0], chunk[i])


def test_the_number_of_steps_is_bounded() -> None:
    policy = make(tolerance=0.0, max_steps=3)
    assert policy.descend(observed(4), generator=seeded(0)).steps.tolist() == [3, 3, 3, 3]


def test_rows_at_rest_are_no_longer_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sizes = make(Bowl, momentum=0.0, tolerance=0.05, max_steps=16), []
    gradient = policy._gradient
    monkeypatch.setattr(policy, "_gradient", lambda x, cond: (sizes.append(len(x)), gradient(x, cond))[1])
    policy.predict({"state": torch.zeros(3, 2, 3)}, noise=distances(0.01, 1.0, 4.0))
    assert sizes[0] == 3
    assert sizes[-1] == 1
    assert sorted(sizes, reverse=True) == sizes


# The traps of the published code


@pytest.mark.parametrize("stop", ["gradient", "energy"])
@pytest.mark.parametrize("network", NETWORKS)
def test_64_rows_at_once_equal_64_rows_alone(network: str, stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the norm and the test for the end were those of the whole batch."""
    policy = make(NETWORKS[network], stop=stop, max_steps=8)
    # A bowl below what is random, so that there is somewhere to rest.
    obs, noise = observed(64), torch.randn(64, 8, 2, generator=seeded(1)) * torch.linspace(0.1, 1, 64)[:, None, None]
    energy = policy._energy
    monkeypatch.setattr(policy, "_energy", lambda x, cond: energy(x, cond) + x.square().sum((1, 2)))
    policy.tolerance = 0.1
    together = policy.descend(obs, noise=noise)
    assert len(together.steps.unique()) > 2
    for i in range(0, 64, 3):
        alone = policy.descend({"state": obs["state"][i : i + 1]}, noise=noise[i : i + 1])
        assert alone.steps.item() == together.steps[i]
        torch.testing.assert_close(alone.chunk[0], together.chunk[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.energy[0], together.energy[i], rtol=1e-4, atol=1e-4)


def test_the_step_size_is_optimised_averaged_and_saved(tmp_path: Path) -> None:
    """There it was a parameter beside the networks, which neither the optimiser nor the checkpoint knew."""
    policy = make().train()
    ema = Ema(policy, power=0.75)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        policy.loss(make_batch(16), policy.draw(16, seeded(seed))).total.backward()
        optimizer.step()
        ema.update(policy)
    learnt, averaged = policy.step_size.item(), ema.average.step_size.item()
    assert len({make().step_size.item(), learnt, averaged}) == 3
    network = {
        "_target_": "flowsteer.policies.networks.energy_transformer.EnergyTransformer",
        "_partial_": True,
        **TRANSFORMER.keywords,
    }
    encoder = {"_target_": "flowsteer.policies.encoders.low_dim.LowDim", "_partial_": True}
    config = {"_target_": "flowsteer.policies.ebt.EnergyPolicy", "encoder": encoder, "network": network}
    save_checkpoint(tmp_path / "c", policy, ema.average, {"policy": config, "spec": SPEC.to_dict()})
    for weights, expected in (("weights", learnt), ("ema", averaged)):
        loaded = load_policy(tmp_path / "c", weights=weights)
        assert isinstance(loaded, EnergyPolicy)
        assert loaded.step_size.item() == expected


def test_the_energy_of_an_executed_part_is_refused() -> None:
    policy, obs = make(), observed(2)
    chunks = policy.predict(obs)
    assert policy.energy(obs, chunks).shape == (2,)
    with pytest.raises(PolicyError, match=r"a chunk must have shape \[B, 8, 2\], got \[2, 4, 2\]"):
        policy.energy(obs, chunks[:, :4])


def test_the_average_descends_its_own_energy() -> None:
    """There the averaged encoder fed the raw energy network."""
    policy = make()
    average = Ema(policy).average
    assert isinstance(average, EnergyPolicy)
    before = average.predict(observed(4), noise=torch.ones(4, 8, 2))
    for parameter in policy.parameters():
        parameter.data.fill_(math.nan)
    assert torch.equal(average.predict(observed(4), noise=torch.ones(4, 8, 2)), before)


def test_actions_beyond_one_are_learnt() -> None:
    """There they were an error; with `mean_std` they are common."""
    batch = make_batch(8)
    batch["action"] *= 10
    assert make().train().loss(batch).total.isfinite()


def test_a_weight_that_is_not_finite_does_not_hang_or_raise() -> None:
    """There it ended the control loop; here the chunk shows it to whoever guards the robot."""
    policy = make()
    policy.log_step_size.data.fill_(math.nan)
    assert policy.predict(observed(2)).isnan().all()


# Who calls it


def test_noise_alone_decides_the_chunk() -> None:
    policy, noise = make(), torch.randn(6, 8, 2, generator=seeded(0))
    chunks = [policy.predict(observed(6), noise=noise, generator=seeded(seed)) for seed in (1, 2)]
    assert torch.equal(*chunks)
    assert not torch.equal(chunks[0], policy.predict(observed(6), noise=-noise))
    with pytest.raises(PolicyError, match=r"noise must have shape \[6, 8, 2\], got \[6, 4, 2\]"):
        policy.predict(observed(6), noise=noise[:, :4])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_needs_no_gradients_of_its_caller(mode: Callable[[], Any]) -> None:
    policy, noise = make(), torch.ones(4, 8, 2)
    expected = policy.act(observed(4), noise=noise)
    with mode():
        actions = policy.act(observed(4), noise=torch.ones(4, 8, 2))
        found = policy.descend(observed(4), noise=torch.ones(4, 8, 2))
    assert torch.equal(actions, expected)
    assert not actions.requires_grad
    assert torch.equal(found.chunk[:, 1:5], expected)
    torch.testing.assert_close(found.energy, policy.energy(observed(4), found.chunk.clone()))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_validation_needs_no_graph() -> None:
    policy, batch = make(), make_batch(8)
    draws = policy.draw(8, seeded(0))
    with torch.no_grad():
        loss = policy.loss(batch, draws).total
    assert not loss.requires_grad
    torch.testing.assert_close(loss, policy.loss(batch, draws).total)


def test_training_cannot_be_compiled() -> None:
    with pytest.raises(PolicyError, match=r"^train.compile=true: torch.compile has no second derivatives"):
        compiled(torch.nn.Sequential(make()), torch.device("cpu"))


def test_a_compiled_engine_is_refused_with_its_reason() -> None:
    with pytest.raises(PolicyError, match=r"no engine can be built: compiled float32 \w+: EnergyPolicy takes grad"):
        compile_act(make(), engine="compiled")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reach": 0.0}, "policy.reach must be in (0, 1], got 0"),
        ({"train_steps": 0}, "policy.train_steps must be at least 1, got 0"),
        ({"step_spread": 0.5}, "policy.step_spread must be at least 1, got 0.5"),
        ({"langevin": -1.0}, "policy.langevin must be at least 0, got -1"),
        ({"momentum": 1.0}, "policy.momentum must be in [0, 1), got 1"),
        ({"tolerance": math.nan}, "policy.tolerance must be at least 0, got nan"),
        ({"max_steps": 0}, "policy.max_steps must be at least 1, got 0"),
        ({"stop": "energies"}, "policy.stop 'energies' is unknown; nearest: energy (known: energy, gradient)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as error:
        make(**options)
    assert str(error.value) == message


def test_what_needs_a_denoiser_refuses_it() -> None:
    policy: Policy = make()
    with pytest.raises(PolicyError, match="steps=3: EnergyPolicy does not denoise, leave steps out"):
        policy.compile_act(steps=3)
