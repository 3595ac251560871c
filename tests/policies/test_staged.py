from functools import partial

import pytest
import torch

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.networks.transformer import DiffusionTransformer
from flowsteer.policies.networks.unet1d import ConditionalUnet1d

SIZES = (2, 8, 2, 3)


def parts(network, t, seed=0):
    """x, features of the times and of the observation."""
    generator = torch.Generator().manual_seed(seed)
    x, obs = torch.randn(len(t), 8, 2, generator=generator), torch.randn(len(t), 2, 3, generator=generator)
    return x, network.embed_time(t), network.embed_observation(obs)


@pytest.fixture(
    params=[
        partial(ResidualMLP, hidden=16),
        partial(ConditionalUnet1d, widths=(8, 16)),
        partial(DiffusionTransformer, width=16, layers=1, heads=2),
    ],
    ids=["mlp", "unet", "transformer"],
)
def staged(request):
    torch.manual_seed(0)
    network = StagedNetwork(*SIZES, network=request.param, switch=0.45)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize(("t", "name"), [(0.9, "early"), (0.46, "early"), (0.45, "late"), (0.1, "late")])
def test_each_time_has_its_network(staged, t, name):
    times = torch.full((4,), t)
    alone = getattr(staged, name)
    torch.testing.assert_close(staged(*parts(staged, times)), alone(*parts(alone, times)))


def test_rows_of_both_stages_in_one_batch(staged):
    times = torch.tensor([0.9, 0.1, 0.5, 0.3])
    early, late = (network(*parts(network, times)) for network in (staged.early, staged.late))
    expected = torch.stack([early[0], late[1], early[2], late[3]])
    torch.testing.assert_close(staged(*parts(staged, times)), expected)


@pytest.mark.parametrize("t", [0.9, 0.1])
def test_a_settled_time_keeps_its_network(staged, t):
    times = torch.full((1,), t)
    x, time, observation = parts(staged, times)
    torch.testing.assert_close(staged(x, staged.settle(time), observation), staged(x, time, observation))


def test_only_the_network_that_is_needed_runs(staged, monkeypatch):
    def fail(*_):
        raise AssertionError("the other network ran")

    monkeypatch.setattr(staged.early, "forward", fail)
    times = torch.full((4,), 0.2)
    staged(*parts(staged, times))


def test_two_networks_that_are_there_already_are_not_copied():
    early, late = (ResidualMLP(*SIZES, hidden=16) for _ in range(2))
    staged = StagedNetwork.of(early, late, 0.3)
    assert staged.early is early
    assert staged.late is late


@pytest.mark.parametrize("switch", [0.0, 1.0, float("nan")])
def test_a_switch_outside_of_the_path_is_refused(switch):
    with pytest.raises(PolicyError, match=r"policy\.network\.switch must be in \(0, 1\), got"):
        StagedNetwork(*SIZES, network=partial(ResidualMLP, hidden=16), switch=switch)
