from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.base import Features, Network
from flowsteer.policies.networks.residual_mlp import ModulatedBlock, ResidualMLP
from flowsteer.policies.networks.transformer import DiffusionTransformer
from flowsteer.policies.networks.unet1d import ConditionalUnet1d, FilmBlock

Make = Callable[..., Network]
NETWORKS: dict[str, Make] = {
    "residual_mlp": partial(ResidualMLP, hidden=32, blocks=2, conditioning=16),
    "unet": partial(ConditionalUnet1d, widths=(16, 32), time_width=16),
    "unet_shift": partial(ConditionalUnet1d, widths=(16, 24, 32), time_width=16, scale=False),
    "transformer": partial(DiffusionTransformer, width=32, layers=2, heads=4),
    "transformer_full": partial(DiffusionTransformer, width=32, layers=1, heads=2, causal=False),
}
DA, TP, TO, F, B = 2, 8, 2, 5, 3


@pytest.fixture(params=NETWORKS)
def make(request: pytest.FixtureRequest) -> Make:
    return NETWORKS[request.param]


def perturbed(network: Network) -> Network:
    """Away from the zeros that it starts with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture
def network(make: Make) -> Network:
    torch.manual_seed(0)
    return perturbed(make(DA, TP, TO, F)).eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, t, encoded observation."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(B, TP, DA, generator=generator),
        torch.rand(B, generator=generator),
        torch.randn(B, TO, F, generator=generator),
    )


def predict(network: Network, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
    out: Tensor = network(x, network.embed_time(t), network.embed_observation(features))
    return out


def rows(features: Features, at: slice) -> Features:
    return tuple(feature[at] for feature in features)


@pytest.mark.parametrize(("action_dim", "prediction_steps", "observation_steps", "feature_dim"), [
    (1, 4, 1, 1), (2, 16, 2, 20), (7, 8, 3, 9), (24, 64, 1, 5),
])  # fmt: skip
def test_prediction_has_the_shape_of_the_chunk(
    make: Make, action_dim: int, prediction_steps: int, observation_steps: int, feature_dim: int
) -> None:
    network = make(action_dim, prediction_steps, observation_steps, feature_dim)
    x, features = torch.randn(B, prediction_steps, action_dim), torch.randn(B, observation_steps, feature_dim)
    assert predict(network, x, torch.rand(B), features).shape == x.shape


def test_an_untrained_network_predicts_zero(make: Make, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    out = predict(make(DA, TP, TO, F), *inputs)
    torch.testing.assert_close(out, torch.zeros_like(out))


def test_gradients_reach_every_parameter(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    predict(network, *inputs).square().sum().backward()
    unreached = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


def test_a_few_steps_fit_a_batch(make: Make, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    network = make(DA, TP, TO, F)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (predict(network, *inputs) - inputs[0].flip(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_prediction_depends_on_chunk_time_and_observation(
    network: Network, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    out = predict(network, *inputs)
    for i in range(3):
        changed = [value + 0.1 if i == j else value for j, value in enumerate(inputs)]
        assert (predict(network, *changed) - out).abs().amax(dim=(1, 2)).min() > 1e-4


def test_one_time_is_shared_by_all_rows(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, features = inputs
    observation = network.embed_observation(features)
    shared = network(x, network.embed_time(torch.tensor([0.3])), observation)
    expanded = network(x, network.embed_time(torch.full((B,), 0.3)), observation)
    torch.testing.assert_close(shared, expanded, rtol=0, atol=1e-5)


def test_batched_rows_equal_single_rows(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    together = predict(network, *inputs)
    for i in range(B):
        x, t, features = (value[i : i + 1] for value in inputs)
        torch.testing.assert_close(predict(network, x, t, features), together[i : i + 1], rtol=0, atol=1e-5)


def test_embedding_once_equals_embedding_at_each_step(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, features = inputs
    grid = torch.linspace(1, 0.1, 4)
    time, observation = network.embed_time(grid), network.embed_observation(features)
    for k in range(4):
        once = network(x, rows(time, slice(k, k + 1)), observation)
        torch.testing.assert_close(once, predict(network, x, grid[k].expand(B), features), rtol=0, atol=1e-5)


def test_forward_touches_no_embedding_weights(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """What depends on time or observation alone is in the embeddings, so that K steps do not repeat it."""
    x, t, features = inputs
    time, observation = network.embed_time(t), network.embed_observation(features)
    embedded = sum(f.sum() for f in (*time, *observation))
    assert isinstance(embedded, Tensor)
    embedded.backward()
    embedding = {name for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    detached = (tuple(f.detach() for f in time), tuple(f.detach() for f in observation))
    network(x, *detached).sum().backward()
    step = {name for name, p in network.named_parameters() if p.grad is not None}
    assert embedding.isdisjoint(step)
    assert embedding | step == {name for name, _ in network.named_parameters()}


def test_bfloat16_autocast_stays_finite_and_close(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    exact = predict(network, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = predict(network, *inputs)
    assert rough.isfinite().all()
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_compiles_without_graph_breaks(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, features = inputs
    time, observation = network.embed_time(t), network.embed_observation(features)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, time, observation), network(x, time, observation))


@pytest.mark.parametrize("make", [
    partial(ResidualMLP, hidden=32, blocks=1, dropout=0.5),
    partial(DiffusionTransformer, width=32, layers=1, dropout=0.5),
])  # fmt: skip
def test_dropout_acts_in_training_only(make: Make, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network = perturbed(make(DA, TP, TO, F))
    assert not torch.equal(predict(network.train(), *inputs), predict(network, *inputs))
    assert torch.equal(predict(network.eval(), *inputs), predict(network, *inputs))


@pytest.mark.parametrize("make", [ResidualMLP, DiffusionTransformer])
@pytest.mark.parametrize("dropout", [2.0, 1.0, -0.1, float("nan")])
def test_dropout_must_leave_something(make: Make, dropout: float) -> None:
    with pytest.raises(PolicyError, match=rf"policy.network.dropout must be in \[0, 1\), got {dropout:g}"):
        make(DA, TP, TO, F, dropout=dropout)


def test_a_closed_gate_passes_the_stream_on() -> None:
    h, modulation = torch.randn(4, 6), torch.randn(4, 18)
    modulation[:, 12:] = 0
    assert torch.equal(ModulatedBlock(6, 2, 0.0)(h, modulation), h)


def test_modulated_block_follows_its_formula() -> None:
    block = ModulatedBlock(6, 2, 0.0)
    h, shift, scale, gate = torch.randn(4, 4, 6).unbind()
    centred = h - h.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = h + gate * block.mlp(normed * (1 + scale) + shift)
    torch.testing.assert_close(block(h, torch.cat([shift, scale, gate], dim=1)), expected)


def test_film_follows_its_formula() -> None:
    h, shift, scale = torch.randn(4, 8, 5), torch.randn(4, 16), torch.randn(4, 16)
    block = FilmBlock(8, 16, 3, scale=True)
    modulated = (1 + scale[:, :, None]) * block.first(h) + shift[:, :, None]
    expected = block.second(modulated) + block.skip(h)
    torch.testing.assert_close(block(h, torch.cat([shift, scale], dim=1)), expected)
    shifting = FilmBlock(8, 16, 3, scale=False)
    expected = shifting.second(shifting.first(h) + shift[:, :, None]) + shifting.skip(h)
    torch.testing.assert_close(shifting(h, shift), expected)


def test_a_causal_action_ignores_later_ones(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, features = inputs
    later = x.clone()
    later[:, 5:] += 1
    for causal in (True, False):
        network = perturbed(DiffusionTransformer(DA, TP, TO, F, width=32, layers=2, causal=causal)).eval()
        before, after = predict(network, x, t, features)[:, :5], predict(network, later, t, features)[:, :5]
        assert torch.allclose(before, after, atol=1e-6) == causal


@pytest.mark.parametrize(("options", "message"), [
    ({"prediction_steps": 10}, "multiple of 4 for a ConditionalUnet1d of 3 widths, got 10; take 12 or fewer widths"),
    ({"widths": (12, 16)}, r"widths of ConditionalUnet1d must be multiples of 8, got \[12, 16\]"),
    ({"widths": ()}, "widths of ConditionalUnet1d"),
    ({"kernel": 4}, "kernel of ConditionalUnet1d must be odd, got 4"),
])  # fmt: skip
def test_unet_refuses_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    sizes = {"action_dim": 2, "prediction_steps": 8, "observation_steps": 2, "feature_dim": 5}
    with pytest.raises(PolicyError, match=message):
        ConditionalUnet1d(**{**sizes, **options})  # type: ignore[arg-type]


def test_transformer_refuses_a_width_that_heads_cannot_share() -> None:
    with pytest.raises(PolicyError, match="must be a multiple of its heads, got 30 and 4"):
        DiffusionTransformer(DA, TP, TO, F, width=30, heads=4)
