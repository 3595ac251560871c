import copy
import math
from functools import partial

import pytest
import torch

from flowsteer.policies.denoising import SOLVERS
from flowsteer.policies.errors import PolicyError
from flowsteer.policies.networks.staged import StagedNetwork
from flowsteer.policies.samplers import Gaussian, transition
from flowsteer.rl_finetune.dppo import DPPO
from flowsteer.rl_finetune.errors import FinetuneError
from flowsteer.rl_finetune.exploration import LearnedNoise, NoiseFloor


def rows_of(memory, rows):
    """Every (decision, step) of a memory."""
    count = len(memory["chain"])
    every = torch.arange(count * rows)
    return every // rows, every % rows


def make(policy, floor=0.1, **options):
    return DPPO(policy, partial(NoiseFloor, first=floor, last=floor), **options)


@pytest.mark.parametrize("family", ["diffusion", "flow"])
def test_before_an_update_all_ratios_are_one(make_policy, observe, generator, family):
    algorithm = make(make_policy(family), fine_tuned_steps=3)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    decision, row = rows_of(memory, 3)
    step = algorithm.step(algorithm.policy.features(obs), memory, decision, row, torch.ones(len(row)))
    assert step.log_ratio.abs().max() < 1e-5
    assert not step.clipped.any()


def test_the_log_probability_of_a_chain_by_hand(make_policy, observe, generator):
    policy = make_policy("flow")
    algorithm = make(policy, fine_tuned_steps=2, reduction="sum", noise_limit=1e9)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    cond = policy.encode(obs)
    for i, k in enumerate((2, 3)):
        x, following = memory["chain"][:, i], memory["chain"][:, i + 1]
        t = policy.grid[k].expand(len(x))
        mean, std = transition(policy.path, x, policy.denoise(x, t, cond), policy.grid[k], policy.grid[k + 1], 1.0)
        expected = torch.distributions.Normal(mean, std.clamp(min=0.1)).log_prob(following)[:, :2].sum((1, 2))
        torch.testing.assert_close(memory["log_prob"][:, i], expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(memory["mean"][:, i], mean, atol=1e-5, rtol=1e-5)


def test_actions_are_the_executed_part_of_the_last_sample(make_policy, observe, generator):
    policy = make_policy("diffusion")
    obs = observe()
    actions, memory = make(policy, fine_tuned_steps=2).explore(obs, policy.features(obs), generator)
    torch.testing.assert_close(actions, 2.0 * memory["chain"][:, -1, :2])


def test_the_loss_by_hand(make_policy, observe, generator):
    # Old log-probabilities moved by hand to log-ratios of +0.5 and -0.5 on the two steps; clip 0.1 at both.
    algorithm = make(make_policy("flow"), fine_tuned_steps=2, clip_first=0.1, clip_last=0.1, denoising_discount=0.5)
    obs = observe(1)
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    memory["log_prob"] = memory["log_prob"] - torch.tensor([[0.5, -0.5]])
    features = algorithm.policy.features(obs)
    decision, row = rows_of(memory, 2)
    step = algorithm.step(features, memory, decision, row, torch.tensor([1.0, 1.0]))
    # min(e^0.5, 1.1) at a discount of 0.5 and min(e^-0.5, 0.9) at 1.
    assert step.loss.item() == pytest.approx(-(0.5 * 1.1 + math.exp(-0.5)) / 2, rel=1e-4)
    assert step.clipped.tolist() == [True, True]
    assert step.log_ratio.tolist() == pytest.approx([0.5, -0.5], abs=1e-4)


def test_one_step_may_be_tuned_alone(make_policy, observe, generator):
    algorithm = make(make_policy("diffusion"), fine_tuned_steps=1)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    zeros = torch.zeros(6, dtype=torch.long)
    step = algorithm.step(algorithm.policy.features(obs), memory, torch.arange(6), zeros, torch.randn(6))
    step.loss.backward()
    assert step.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in algorithm.policy.network.parameters())


@pytest.mark.parametrize("k", [2, 4])
def test_the_acting_policy_equals_the_chain_without_extra_noise(make_policy, observe, k):
    policy = make_policy("flow")
    algorithm = make(policy, floor=1e-6, fine_tuned_steps=k, noise_limit=1e9, eta=0.5)
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    obs = observe()
    actions, _ = algorithm.explore(obs, policy.features(obs), torch.Generator().manual_seed(3))
    acted = algorithm.acting().act(obs, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(acted, actions, atol=1e-4, rtol=1e-4)


def test_the_acting_policy_follows_the_weights_that_learn_and_keeps_the_cloned_ones(make_policy, observe):
    policy = make_policy("diffusion")
    before = copy.deepcopy(policy)
    algorithm = make(policy, fine_tuned_steps=2)
    acting = algorithm.acting()
    for parameter in policy.network.parameters():
        parameter.data.add_(0.3)
    assert isinstance(acting.network, StagedNetwork)
    for (name, late), early in zip(acting.network.late.named_parameters(), before.network.parameters(), strict=True):
        torch.testing.assert_close(late, early + 0.3)
        torch.testing.assert_close(acting.network.early.get_parameter(name), early)
    x, cond = torch.randn(6, 4, 2), acting.encode(observe())
    old, new = before.encode(observe()), policy.encode(observe())
    for t, expected, features in ((0.8, before, old), (0.3, policy, new)):
        times = torch.full((6,), t)
        torch.testing.assert_close(acting.denoise(x, times, cond), expected.denoise(x, times, features))


def test_the_description_rebuilds_the_acting_policy(make_policy):
    policy = make_policy("flow")
    algorithm = make(policy, fine_tuned_steps=2, steps=5, eta=0.5)
    network = {"_target_": "flowsteer.policies.networks.residual_mlp.ResidualMLP", "_partial_": True}
    told = algorithm.describe({"_target_": "x", "network": network, "steps": 4, "eta": 0.0, "solver": "heun"})
    assert (told["steps"], told["eta"], told["solver"]) == (5, 0.5, "transition")
    assert told["network"]["_target_"] == "flowsteer.policies.networks.staged.StagedNetwork"
    assert told["network"]["network"] == network
    # Steps at 1, 0.8, 0.6 of the cloned network, at 0.4 and 0.2 of the tuned one.
    assert told["network"]["switch"] == pytest.approx(0.5)


def test_all_steps_tuned_need_no_second_network(make_policy):
    algorithm = make(make_policy("flow"), fine_tuned_steps=4)
    assert not isinstance(algorithm.acting().network, StagedNetwork)
    assert algorithm.describe({"network": {"a": 1}})["network"] == {"a": 1}


def test_only_the_tuned_weights_learn(make_policy, observe, generator):
    algorithm = make(make_policy("flow"), fine_tuned_steps=2)
    assert not any(p.requires_grad for p in algorithm.cloned.parameters())
    learning = {id(p) for p in algorithm.parameters() if p.requires_grad}
    assert learning == {id(p) for p in algorithm.policy.network.parameters()}


def test_a_guarded_ratio_has_no_drift(make_policy, observe):
    # Under the old policy log r has the mean -|dmu|^2 / (2 std^2); the guarded one has 0.
    algorithm = make(make_policy("flow"), fine_tuned_steps=1, normalize_ratio=True)
    old, shift = torch.zeros(20_000, 4, 2), 0.5
    std = torch.tensor([0.5])
    new = Gaussian(old + shift, std)
    x = std * torch.randn(20_000, 4, 2, generator=torch.Generator().manual_seed(0))
    plain = algorithm._log_prob(new, x) - algorithm._log_prob(Gaussian(old, std), x)
    assert plain.mean().item() == pytest.approx(-(shift**2) / (2 * 0.25), abs=0.02)
    guarded = algorithm._guarded(plain, new, old)
    assert guarded.mean().item() == pytest.approx(0, abs=0.01)
    # What is left of each element is (x - mu_old) dmu / std^2 * std, whose deviation is |dmu|; of a mean of four, half.
    assert guarded.std().item() == pytest.approx(shift / 2, rel=0.03)


def test_a_guarded_ratio_knows_the_floor_and_hides_no_kl(make_policy, observe, generator):
    algorithm = make(make_policy("flow"), floor=0.1, fine_tuned_steps=1, normalize_ratio=True, log_prob_floor=0.5)
    old, shift = torch.zeros(20_000, 4, 2), 0.5
    x = 0.5 * torch.randn(20_000, 4, 2, generator=torch.Generator().manual_seed(0))
    new, before = (Gaussian(mean, torch.tensor([0.1])) for mean in (old + shift, old))
    plain = algorithm._log_prob(new, x) - algorithm._log_prob(before, x)
    assert algorithm._guarded(plain, new, old).mean().item() == pytest.approx(0, abs=0.01)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    decision, row = rows_of(memory, 1)
    memory["log_prob"] = memory["log_prob"] - 0.25
    step = algorithm.step(algorithm.policy.features(obs), memory, decision, row, torch.ones(len(row)))
    torch.testing.assert_close(step.log_ratio, torch.full_like(step.log_ratio, 0.25), rtol=1e-3, atol=0)


def test_ten_steps_are_tuned_or_all_there_are(make_policy):
    assert make(make_policy("flow")).rows == 4
    assert make(make_policy("flow"), steps=12).rows == 10


def test_the_anchor_is_zero_at_the_cloned_policy_and_grows_away_from_it(make_policy, observe, generator):
    algorithm = make(make_policy("flow"), fine_tuned_steps=2, anchor=1.0)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    decision, row = rows_of(memory, 2)
    arguments = (algorithm.policy.features(obs), memory, decision, row, torch.zeros(len(row)))
    assert algorithm.step(*arguments).loss.item() == pytest.approx(0, abs=1e-9)
    for parameter in algorithm.policy.network.parameters():
        parameter.data.add_(0.1)
    moved = algorithm.step(*arguments)
    assert moved.loss.item() > 1e-4
    assert moved.parts["anchor"].item() == pytest.approx(moved.loss.item())


def test_noise_floors_by_hand():
    floor = NoiseFloor(3, 2, 2, first=0.3, last=0.1, final_share=0.5)
    std, features = torch.full((3, 1, 1), 0.15), torch.zeros(5, 1, 2)
    levels = floor.levels(features, 0.0)
    assert levels.shape == (5, 3, 1)
    assert floor(std, levels[0][:, None]).flatten().tolist() == pytest.approx([0.3, 0.2, 0.15])
    # At the end of training half of it.
    halved = floor.levels(features, 1.0)[0][:, None]
    assert floor(std, halved).flatten().tolist() == pytest.approx([0.15, 0.15, 0.15])


def test_learned_noise_stays_in_its_bounds_and_learns(make_policy, observe, generator):
    algorithm = DPPO(make_policy("flow"), partial(LearnedNoise, low=0.05, high=0.2), fine_tuned_steps=2)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), generator)
    decision, row = rows_of(memory, 2)
    features = algorithm.policy.features(obs)
    levels = algorithm.exploration.levels(features, 0.0)
    assert levels.shape == (6, 2, 2)
    assert bool(((levels >= 0.05) & (levels <= 0.2)).all())
    torch.testing.assert_close(algorithm.exploration(torch.zeros(1), levels), levels)
    both = algorithm.exploration(torch.full((1,), 0.3), levels)
    torch.testing.assert_close(both, (levels.square() + 0.09).sqrt())
    algorithm.step(features, memory, decision, row, torch.randn(12)).loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in algorithm.exploration.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fine_tuned_steps": 5}, "algo.fine_tuned_steps must be from 1 to the 4 denoising steps, got 5"),
        ({"fine_tuned_steps": 0}, "algo.fine_tuned_steps must be from 1 to the 4 denoising steps, got 0"),
        ({"log_prob_limits": (2.0, -5.0)}, "algo.log_prob_limits must be [low, high], got [2.0, -5.0]"),
        ({"log_prob_limits": (-5.0,)}, "algo.log_prob_limits must be [low, high], got [-5.0]"),
        ({"log_prob_limits": (-5.0, 2.0, 3.0)}, "algo.log_prob_limits must be [low, high], got [-5.0, 2.0, 3.0]"),
        (
            {"log_prob_limits": (-5.0, 2.0), "normalize_ratio": True},
            "algo.normalize_ratio takes whole log-probabilities: leave algo.log_prob_limits out",
        ),
        ({"eta": 1.5, "fine_tuned_steps": 2}, "algo.eta must be in [0, 1], got 1.5"),
        ({"clip_last": 0.0, "fine_tuned_steps": 2}, "algo.clip_last must be positive, got 0"),
        ({"noise_limit": 0.0, "fine_tuned_steps": 2}, "algo.noise_limit must be positive, got 0"),
        (
            {"anchor": 1.0, "fine_tuned_steps": 4, "train_encoder": True},
            "algo.train_encoder=true needs algo.fine_tuned",
        ),
        (
            {"fine_tuned_steps": 2, "train_encoder": True},
            "algo.train_encoder=true needs algo.fine_tuned_steps=4 and algo.anchor=0: the cloned",
        ),
        ({"floor": 0.0, "fine_tuned_steps": 2}, "algo.exploration's floors must be positive, got 0 and 0 times 1"),
    ],
)
def test_options_out_of_range_are_refused(make_policy, options, message):
    with pytest.raises(FinetuneError) as error:
        make(make_policy("flow"), **options)
    assert message in str(error.value)


def test_more_steps_than_the_network_has_learnt_are_refused(make_policy):
    with pytest.raises(PolicyError, match=r"policy\.steps=200 from policy\.start=1 asks the network at t = 0\.005"):
        make(make_policy("diffusion"), steps=200)


def test_the_acting_policy_takes_the_transitions_whatever_solved_the_cloned_one(make_policy, observe, generator):
    policy = make_policy("flow")
    policy.solver = SOLVERS["heun"]
    assert make(policy, fine_tuned_steps=2).acting().act(observe(), generator=generator).isfinite().all()


def test_without_eta_only_exploration_is_random_and_the_judged_policy_is_not(make_policy, observe):
    algorithm = make(make_policy("flow"), floor=0.05, fine_tuned_steps=2, eta=0.0)
    seeds = [torch.Generator().manual_seed(s) for s in (0, 1)]
    noise = torch.randn(6, 4, 2)
    first, second = (algorithm.acting().act(observe(), noise=noise, generator=g) for g in seeds)
    torch.testing.assert_close(first, second)
    obs = observe()
    _, memory = algorithm.explore(obs, algorithm.policy.features(obs), seeds[0])
    moved = memory["chain"][:, 1:] - memory["mean"]
    assert 0.02 < moved.std() < 0.08


def test_log_probabilities_may_have_a_floor_and_limits_of_their_own(make_policy, observe, generator):
    algorithm = make(
        make_policy("flow"), floor=0.01, fine_tuned_steps=1, log_prob_floor=0.5, log_prob_limits=(-1.0, 2.0)
    )
    gaussian = Gaussian(torch.zeros(1, 4, 2), torch.tensor(0.01))
    x = torch.zeros(1, 4, 2)
    x[0, 0, 0] = 5.0
    # Of the four executed elements three are at the mean: -log 0.5 - log(2 pi) / 2; one is far off and clamped.
    at_mean = -math.log(0.5) - math.log(2 * math.pi) / 2
    assert algorithm._log_prob(gaussian, x).item() == pytest.approx((3 * at_mean - 1.0) / 4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gaussian", "class GaussianPolicy; algo=ppo takes it"),
        ("ebt", "class EnergyPolicy; no algorithm here takes it: clone one that denoises"),
    ],
)
def test_a_policy_without_denoise_is_refused(make_policy, family, reason):
    with pytest.raises(FinetuneError, match=rf"algo=dppo needs a policy that denoises .* {reason}"):
        make(make_policy(family))


@pytest.mark.parametrize(("options", "copies"), [({}, 1), ({"fine_tuned_steps": 2}, 2), ({"anchor": 1.0}, 2)])
def test_the_cloned_policy_is_kept_only_where_it_is_needed(make_policy, options, copies):
    policy = make_policy("flow")
    algorithm = make(policy, **options)
    weights = sum(p.numel() for p in policy.parameters())
    assert sum(p.numel() for p in algorithm.parameters()) == copies * weights
