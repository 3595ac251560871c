"""What the denoising families refuse, and what they do at the edges of what they accept."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowsteer.policies.denoising import DiffusionPolicy, FlowPolicy
from flowsteer.policies.encoders.low_dim import LowDim
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.energy_transformer import EnergyTransformer
from flowsteer.policies.networks.residual_mlp import ResidualMLP
from flowsteer.policies.spec import ArraySpec, PolicySpec

SPEC = PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0)
NETWORK = partial(ResidualMLP, hidden=16, blocks=1)
OBS = {"state": torch.zeros(4, 2, 3)}


def make(family: type[DiffusionPolicy] | type[FlowPolicy], **options: Any) -> DiffusionPolicy | FlowPolicy:
    torch.manual_seed(0)
    policy = family(SPEC, LowDim, NETWORK, **options)
    policy.fit_normalizer({key: statistics(width) for key, width in (("state", 3), ("action", 2))})
    return policy.eval()


def statistics(width: int) -> Any:
    """Values of -8, 0 and 8 whose mean is 0 and whose standard deviation is 2."""
    ones = np.ones(width)
    return SimpleNamespace(min=-8 * ones, max=8 * ones, mean=0 * ones, std=2 * ones)


@pytest.mark.parametrize("family", [DiffusionPolicy, FlowPolicy])
@pytest.mark.parametrize("kind", ["mean_std", "identity"])
def test_the_bound_of_a_min_max_action_is_refused_for_another(
    family: type[DiffusionPolicy] | type[FlowPolicy], kind: str
) -> None:
    with pytest.raises(PolicyError, match=rf"policy.clip=1 .* the action is normalised by '{kind}': set policy.clip=n"):
        make(family, normalizers={"action": kind})
    make(family, normalizers={"state": kind})
    make(family, normalizers={"action": "min_max"})


@pytest.mark.parametrize("key", ["action", "state"])
def test_a_normaliser_that_there_is_not_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(PolicyError, match=rf"the normaliser of key '{key}' 'minmax' is unknown; nearest: min_max"):
        make(FlowPolicy, normalizers={key: "minmax"})


@pytest.mark.parametrize("family", [DiffusionPolicy, FlowPolicy])
def test_without_a_bound_actions_beyond_a_standard_deviation_are_reached(
    family: type[DiffusionPolicy] | type[FlowPolicy],
) -> None:
    policy = make(family, normalizers={"action": "mean_std"}, clip=None, prediction="x0")
    # A network that says 3 everywhere: three standard deviations of 2.
    policy.network.output.bias.data.fill_(3.0)
    torch.testing.assert_close(policy.act(OBS), torch.full((4, 4, 2), 6.0))


@pytest.mark.parametrize("family", [DiffusionPolicy, FlowPolicy])
def test_a_network_that_knows_no_time_is_refused(family: type[DiffusionPolicy] | type[FlowPolicy]) -> None:
    with pytest.raises(PolicyError, match=r"EnergyTransformer knows no time, .* another network, or policy=ebt"):
        family(SPEC, LowDim, partial(EnergyTransformer, width=16, layers=1))


def test_eps_is_refused_where_the_path_starts_without_signal() -> None:
    with pytest.raises(PolicyError, match=r"policy.prediction=eps divides by alpha, .* set policy.start=0.99"):
        make(FlowPolicy, prediction="eps")
    assert make(FlowPolicy, prediction="eps", start=0.99).act(OBS).isfinite().all()
    assert make(DiffusionPolicy, prediction="eps").act(OBS).isfinite().all()


def test_a_grid_below_the_times_of_training_is_refused() -> None:
    message = r"policy.steps=200 from policy.start=1 asks .* at t = 0.005, .* trained from t = 0.01 on: lower policy.st"
    with pytest.raises(PolicyError, match=message):
        make(DiffusionPolicy, steps=200)
    with pytest.raises(PolicyError, match=r"policy.steps=51 from policy.start=0.5"):
        make(DiffusionPolicy, steps=51, start=0.5)
    with pytest.raises(PolicyError, match=r"at t = 0.00099"):
        make(FlowPolicy, steps=1001)


@pytest.mark.parametrize("train_steps", [1, 3, 49, 100, 1000])
def test_every_knot_of_the_schedule_may_be_a_step(train_steps: int) -> None:
    assert len(make(DiffusionPolicy, steps=train_steps, train_steps=train_steps).grid) == train_steps + 1
    assert len(make(FlowPolicy, steps=1000).grid) == 1001


@pytest.mark.parametrize("family", [DiffusionPolicy, FlowPolicy])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_what_is_frozen_asks_its_path_nothing_and_samples_as_before(
    family: type[DiffusionPolicy] | type[FlowPolicy], eta: float, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, other = (make(family, eta=eta, steps=4, prediction=prediction, start=0.9) for _ in range(2))
    for network in (policy.network, other.network):
        torch.nn.init.normal_(network.output.weight, generator=torch.Generator().manual_seed(0))
    policy.freeze_times()

    def asked(*_: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(type(policy.path), "alpha", asked)
        patch.setattr(type(policy.path), "sigma", asked)
        frozen = policy.act(OBS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(frozen, other.act(OBS, generator=torch.Generator().manual_seed(0)))
    for each in (policy, other):
        each.set_steps(3)
    assert torch.equal(*(each.act(OBS, generator=torch.Generator().manual_seed(0)) for each in (policy, other)))


@pytest.mark.parametrize("solver", ["heun", "dpm_solver_2m"])
def test_a_deterministic_solver_is_refused_with_noise_when_it_is_built(solver: str) -> None:
    with pytest.raises(PolicyError, match=rf"policy.solver={solver} is deterministic: set policy.eta=0, got 0.5"):
        make(FlowPolicy, solver=solver, eta=0.5)
