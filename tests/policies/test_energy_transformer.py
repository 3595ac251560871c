from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.energy_transformer import EnergyTransformer, attend, rms_norm

DA, TP, TO, F, B = 2, 6, 2, 5, 4
SMALL = partial(EnergyTransformer, width=16, layers=2, heads=2, memory_tokens=2)
NO_TIME = torch.zeros(1)


@pytest.fixture(params=[1, 3, 4], ids=lambda steps: f"{steps}_actions_a_token")
def network(request: pytest.FixtureRequest) -> EnergyTransformer:
    """Away from the zeros that it starts with; 6 actions make 6, 2 and, the last half empty, 2 tokens."""
    torch.manual_seed(0)
    network = SMALL(DA, TP, TO, F, token_steps=request.param)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Chunks and encoded observations."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, TP, DA, generator=generator), torch.randn(B, TO, F, generator=generator)


def run(network: EnergyTransformer, x: Tensor, features: Tensor) -> Tensor:
    out: Tensor = network(x, network.embed_time(NO_TIME), network.embed_observation(features))
    return out


def test_rms_norm_by_hand() -> None:
    # Each token by the root of (9 + 16) / 2 and of (1 + 1) / 2, whatever stands beside it.
    tokens = torch.tensor([[[3.0, 4.0]], [[1.0, -1.0]]])
    scale = (25 / 2) ** 0.5
    torch.testing.assert_close(rms_norm(tokens), torch.tensor([[[3 / scale, 4 / scale]], [[1.0, -1.0]]]))


def test_attention_by_hand() -> None:
    # Logits 0 and log 3: a quarter of the first value and three of the second.
    key = torch.tensor([[[[0.0], [1.0]]]])
    value = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    query = torch.tensor([[[[3.0]]]]).log()
    torch.testing.assert_close(attend(query, key, value), torch.tensor([[[1.0, 6.0]]]))


def test_an_untrained_network_predicts_zero(inputs: tuple[Tensor, Tensor]) -> None:
    assert not run(SMALL(DA, TP, TO, F), *inputs).any()


def test_chunk_and_observation_matter(network: EnergyTransformer, inputs: tuple[Tensor, Tensor]) -> None:
    out = run(network, *inputs)
    assert out.shape == (B, TP, DA)
    for i in range(2):
        changed = [value + 0.1 if i == j else value for j, value in enumerate(inputs)]
        assert (run(network, *changed) - out).abs().amax((1, 2)).min() > 1e-4


def test_a_row_knows_nothing_of_its_batch(network: EnergyTransformer, inputs: tuple[Tensor, Tensor]) -> None:
    """A norm over the whole tensor makes a policy that was trained in batches another one on a robot."""
    together = run(network, *inputs)
    stretched = run(network, *(torch.cat([part[:1], 100 * part[1:]]) for part in inputs))
    torch.testing.assert_close(stretched[:1], together[:1])
    for i in range(B):
        alone = run(network, *(part[i : i + 1] for part in inputs))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


def test_attention_stays_soft_far_from_training(network: EnergyTransformer, inputs: tuple[Tensor, Tensor]) -> None:
    """Logits of normalised queries and keys are bounded, however large the chunk."""
    x, features = inputs
    near, far = run(network, 1e3 * x, features), run(network, 1e6 * x, features)
    torch.testing.assert_close(near, far, rtol=0.05, atol=0.05)


def test_it_can_be_differentiated_twice(network: EnergyTransformer, inputs: tuple[Tensor, Tensor]) -> None:
    network = network.double()
    x, features = (part.double() for part in inputs)
    observation = network.embed_observation(features)

    def total(x: Tensor) -> Tensor:
        return network(x, network.embed_time(NO_TIME), tuple(part.detach() for part in observation)).square().sum()

    torch.manual_seed(0)
    assert torch.autograd.gradgradcheck(total, x.requires_grad_(), fast_mode=True)


def test_the_gradient_of_a_gradient_reaches_every_parameter(
    network: EnergyTransformer, inputs: tuple[Tensor, Tensor]
) -> None:
    x, features = inputs
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(run(network, x, features).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "multiple of its heads, got 10 and 4"),
        ({"layers": 0}, "policy.network.layers must be at least 1, got 0"),
        ({"token_steps": 0}, "policy.network.token_steps must be at least 1, got 0"),
        ({"memory_tokens": 0}, "policy.network.memory_tokens must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        EnergyTransformer(DA, TP, TO, F, **options)
