from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.attention import CrossAttention, SelfAttention, merge_heads, split_heads
from flowsteer.policies.networks.mlp import MLP
from flowsteer.policies.networks.time import Sinusoids, TimeEmbedding


def test_sinusoids_by_hand() -> None:
    # Width 4 has the periods 0.004 and 4: at t = 1 whole turns and a quarter, at 0.001 a quarter and pi/2000.
    slow = math.pi / 2000
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, math.cos(slow), 1, math.sin(slow)]])
    actual = Sinusoids(4)(torch.tensor([0.0, 1.0, 0.001]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


def test_sinusoids_tell_all_times_of_a_grid_apart() -> None:
    waves = Sinusoids(64)(torch.linspace(0, 1, 1001))
    assert torch.cdist(waves, waves).fill_diagonal_(1).min() > 0.1


def test_autocast_does_not_blur_times() -> None:
    t = torch.linspace(0, 1, 101)
    with torch.autocast("cpu", torch.bfloat16):
        rough = Sinusoids(16)(t)
    assert torch.equal(rough, Sinusoids(16)(t))


@pytest.mark.parametrize("width", [0, 2, 7])
def test_sinusoids_refuse_widths_without_two_pairs(width: int) -> None:
    with pytest.raises(PolicyError, match=f"even and at least 4, got {width}"):
        TimeEmbedding(width)


def test_mlp_by_hand() -> None:
    net = MLP((2, 2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        net[0].bias.copy_(torch.tensor([0.5, 0.0]))
        net[2].weight.copy_(torch.tensor([[2.0, 10.0]]))
        net[2].bias.fill_(-1)
    # Hidden: 1 + 2 * 3 + 0.5 = 7.5 and -1; the activation is x / (1 + exp(-x)).
    first, second = 7.5 / (1 + math.exp(-7.5)), -1 / (1 + math.e)
    assert net(torch.tensor([[1.0, 3.0]])).item() == pytest.approx(2 * first + 10 * second - 1)


def test_only_hidden_layers_are_activated() -> None:
    assert [type(layer) for layer in MLP((3, 4, 4, 2))] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert [type(layer) for layer in MLP([3, 2])] == [nn.Linear]


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0, 1)])
def test_mlp_refuses_missing_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(PolicyError, match="input and output sizes of at least 1"):
        MLP(sizes)


def test_heads_split_and_merge() -> None:
    tokens = torch.arange(12.0).reshape(1, 2, 6)
    split = split_heads(tokens, 3)
    assert split[0, 2].tolist() == [[4, 5], [10, 11]]
    assert torch.equal(merge_heads(split), tokens)


def test_a_single_memory_is_read_whatever_the_query() -> None:
    attention = CrossAttention(6, 3)
    key, value = torch.randn(2, 4, 3, 1, 2)
    seen = attention(torch.randn(4, 5, 6), key, value)
    torch.testing.assert_close(seen, attention.output(merge_heads(value)).expand(4, 5, 6))


def test_the_first_causal_token_sees_itself_only() -> None:
    attention = SelfAttention(4, 2, causal=True)
    tokens = torch.randn(3, 5, 4)
    value = attention.project(tokens[:, :1])[:, :, 8:]
    torch.testing.assert_close(attention(tokens)[:, :1], attention.output(value))


def test_self_attention_without_mask_is_equivariant_to_order() -> None:
    attention, order = SelfAttention(4, 2), torch.tensor([2, 0, 1])
    tokens = torch.randn(3, 3, 4)
    torch.testing.assert_close(attention(tokens)[:, order], attention(tokens[:, order]))
