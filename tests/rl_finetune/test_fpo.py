import math

import pytest
import torch

from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.fpo import FPO


def explored(algorithm, observe, generator, rows=6):
    obs = observe(rows)
    actions, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    return actions, memory, algorithm.policy.features(obs)


@pytest.mark.parametrize("family", ["diffusion", "flow"])
@pytest.mark.parametrize("per_pair", [True, False])
def test_before_an_update_all_ratios_are_one(make_policy, observe, generator, family, per_pair):
    algorithm = FPO(make_policy(family), pairs=3, per_pair=per_pair)
    _, memory, features = explored(algorithm, observe, generator)
    step = algorithm.step(features, memory, torch.arange(6), torch.zeros(6, dtype=torch.long), torch.ones(6))
    assert step.log_ratio.shape == (18 if per_pair else 6,)
    assert step.log_ratio.abs().max() < 1e-5
    assert not step.clipped.any()


def test_the_stored_losses_are_the_policys_own(make_policy, observe, generator):
    policy = make_policy("flow")
    algorithm = FPO(policy, pairs=3, whole_chunk=True, as_eps=False)
    _, memory, features = explored(algorithm, observe, generator)
    cond = policy.network.embed_observation(features)
    for n in range(3):
        loss = policy.denoising_loss(memory["chunk"], cond, memory["time"][:, n], memory["noise"][:, n])
        torch.testing.assert_close(memory["loss"][:, n], loss)


def test_only_the_executed_part_counts_unless_told(make_policy, observe, generator):
    policy = make_policy("flow")
    algorithm = FPO(policy, pairs=1, as_eps=False)
    _, memory, features = explored(algorithm, observe, generator)
    cond = policy.network.embed_observation(features)
    error = policy.denoising_error(memory["chunk"], cond, memory["time"][:, 0], memory["noise"][:, 0])
    torch.testing.assert_close(memory["loss"][:, 0], error[:, :2].square().mean((1, 2)))


def test_the_times_of_a_chunk_cover_the_path(make_policy, observe, generator):
    _, memory, _ = explored(FPO(make_policy("flow"), pairs=4), observe, generator)
    # One time in each quarter, wherever the comb starts.
    gaps = memory["time"].sort(dim=1).values.diff(dim=1)
    assert gaps.min() > 0.2


@pytest.mark.parametrize(("per_pair", "expected"), [(True, (1.2 + 0.5) / 2), (False, math.exp(math.log(1.0) / 2))])
def test_the_loss_by_hand(make_policy, observe, generator, per_pair, expected):
    # One loss has fallen by log 2, one has risen: ratios 2 (clipped at 1.2) and 1/2; or one ratio of the mean, 1.
    algorithm = FPO(make_policy("flow"), pairs=2, per_pair=per_pair, clip=0.2)
    _, memory, features = explored(algorithm, observe, generator, rows=1)
    memory["loss"] = memory["loss"] + torch.tensor([[math.log(2), -math.log(2)]])
    step = algorithm.step(
        features, memory, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.ones(1)
    )
    assert step.loss.item() == pytest.approx(-expected, rel=1e-4)
    assert step.clipped.tolist() == ([True, True] if per_pair else [False])


def test_descending_makes_a_good_chunk_more_likely(make_policy, observe, generator):
    algorithm = FPO(make_policy("flow"), pairs=8, clip=0.5)
    _, memory, features = explored(algorithm, observe, generator)
    optimizer = torch.optim.SGD(algorithm.policy.network.parameters(), lr=0.05)
    arguments = (features, memory, torch.arange(6), torch.zeros(6, dtype=torch.long))
    for sign in (1.0, -1.0):
        before = algorithm.step(*arguments, torch.full((6,), sign)).parts["denoising_loss"]
        for _ in range(5):
            optimizer.zero_grad()
            algorithm.step(*arguments, torch.full((6,), sign)).loss.backward()
            optimizer.step()
        after = algorithm.step(*arguments, torch.full((6,), sign)).parts["denoising_loss"]
        assert sign * (before - after) > 0


def test_the_error_of_eps_is_that_of_the_prediction_times_alpha_for_a_flow(make_policy, observe, generator):
    # eps_hat - eps = (1 - t) (u_hat - u) (McAllister et al. 2025).
    policy = make_policy("flow")
    plain, weighted = (FPO(policy, pairs=2, whole_chunk=True, as_eps=as_eps) for as_eps in (False, True))
    _, memory, features = explored(plain, observe, generator)
    cond = policy.network.embed_observation(features)
    expected = memory["loss"] * (1 - memory["time"]).square()
    torch.testing.assert_close(weighted._losses(cond, memory, torch.arange(6)), expected)


def test_huber_and_the_limits_by_hand(make_policy, observe, generator):
    policy = make_policy("flow")
    cond = policy.network.embed_observation(policy.features(observe()))
    _, memory, _ = explored(FPO(policy, pairs=1), observe, generator)
    error = policy.denoising_error(memory["chunk"], cond, memory["time"][:, 0], memory["noise"][:, 0])[:, :2].detach()
    huber = torch.where(error.abs() < 0.1, error.square() / 2, 0.1 * (error.abs() - 0.05)).mean((1, 2))
    with torch.no_grad():
        losses = FPO(policy, pairs=1, as_eps=False, huber=0.1)._losses(cond, memory, torch.arange(6))[:, 0]
        limited = FPO(policy, pairs=1, as_eps=False, loss_limit=1e-3)._losses(cond, memory, torch.arange(6))
    torch.testing.assert_close(losses, huber)
    assert limited.max().item() == pytest.approx(1e-3, rel=1e-3)


def test_perturbation_moves_the_actions(make_policy, observe):
    policy = make_policy("flow")
    obs = observe()
    still, moved, usual = (
        FPO(policy, perturbation=p).explore(obs, policy.features(obs), torch.Generator().manual_seed(0)).actions
        for p in (0.0, 0.1, None)
    )
    # 0.1 of the normalised range is 0.2 of the physical one.
    assert 0.05 < (still - moved).std() < 0.5
    torch.testing.assert_close(usual, moved)


@pytest.mark.parametrize("reduction", ["mean", "sqrt", "sum"])
def test_the_limit_of_the_loss_leaves_a_trust_region_whatever_the_reduction(make_policy, observe, generator, reduction):
    """The limit is of a mean error: a sum over 200 elements is above 20 for every network, and its ratios all 1."""
    algorithm = FPO(make_policy("flow"), pairs=4, reduction=reduction, loss_limit=0.3)
    _, memory, features = explored(algorithm, observe, generator)
    for parameter in algorithm.policy.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    rows = torch.arange(6)
    step = algorithm.step(features, memory, rows, torch.zeros_like(rows), torch.ones(6))
    assert (step.log_ratio != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "algo.pairs must be at least 1, got 0"),
        ({"clip": 0.0}, "algo.clip must be positive, got 0"),
        ({"perturbation": -1.0}, "algo.perturbation must be not negative, got -1"),
        ({"huber": 0.0}, "algo.huber must be positive or null, got 0"),
        ({"ratio_limit": 0.0}, "algo.ratio_limit must be positive, got 0"),
    ],
)
def test_options_out_of_range_are_refused(make_policy, options, message):
    with pytest.raises(FinetuneError) as error:
        FPO(make_policy("flow"), **options)
    assert str(error.value) == message


@pytest.mark.parametrize(("family", "name"), [("gaussian", "GaussianPolicy"), ("ebt", "EnergyPolicy")])
def test_a_policy_without_denoising_loss_is_refused(make_policy, family, name):
    with pytest.raises(FinetuneError, match=rf"algo=fpo needs a policy that denoises .* class {name}"):
        FPO(make_policy(family))
