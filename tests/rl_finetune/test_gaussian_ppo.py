import math

import pytest
import torch

from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.gaussian_ppo import GaussianPPO

NONE = torch.zeros(6, dtype=torch.long)


def test_before_an_update_all_ratios_are_one(make_policy, observe, generator):
    algorithm = GaussianPPO(make_policy("gaussian"))
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    step = algorithm.step(algorithm.policy.features(obs), memory, torch.arange(6), NONE, torch.ones(6))
    assert step.log_ratio.abs().max() < 1e-5


def test_log_probabilities_are_those_of_the_executed_part(make_policy, observe, generator):
    policy = make_policy("gaussian")
    obs = observe()
    actions, memory = GaussianPPO(policy).explore(obs, policy.features(obs), generator)
    gaussian = policy.distribution(policy.features(obs))
    normal = torch.distributions.Normal(gaussian.mean, gaussian.std.expand_as(gaussian.mean))
    expected = normal.log_prob(memory["chunk"])[:, :2].sum((1, 2))
    torch.testing.assert_close(memory["log_prob"], expected)
    torch.testing.assert_close(actions, 2.0 * memory["chunk"][:, :2])


def test_the_loss_by_hand(make_policy, observe, generator):
    algorithm = GaussianPPO(make_policy("gaussian"), entropy=0.5)
    obs = observe(1)
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    memory["log_prob"] = memory["log_prob"] - math.log(2)
    step = algorithm.step(algorithm.policy.features(obs), memory, NONE[:1], NONE[:1], torch.ones(1))
    # Ratio 2, clipped at 1.2; the log of the deviation starts at -1.
    assert step.loss.item() == pytest.approx(-1.2 + 0.5, rel=1e-4)


def test_the_judged_policy_acts_with_its_mean(make_policy, observe):
    policy = make_policy("gaussian")
    acting = GaussianPPO(policy).acting()
    first, second = (acting.act(observe(), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    torch.testing.assert_close(first, second)


def test_other_families_are_refused(make_policy):
    with pytest.raises(
        FinetuneError, match="algo=ppo needs policy=gaussian, this is of the class FlowPolicy; algo=dppo"
    ):
        GaussianPPO(make_policy("flow"))


def test_a_clip_of_nothing_is_refused(make_policy):
    with pytest.raises(FinetuneError, match=r"algo\.clip must be positive, got 0"):
        GaussianPPO(make_policy("gaussian"), clip=0.0)
