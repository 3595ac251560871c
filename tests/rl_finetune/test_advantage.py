import pytest
import torch

from flowsteer.rl_finetune.advantage import RewardScale, gae


def column(*values):
    return torch.tensor(values)[:, None]


def test_gae_by_hand():
    # gamma = 0.5, lambda = 0.5, one environment, the episode goes on beyond the last decision.
    # delta_2 = 3 + 0.5 * 4 - 2 = 3            A_2 = 3
    # delta_1 = 2 + 0.5 * 2 - 1 = 2            A_1 = 2 + 0.25 * 3 = 2.75
    # delta_0 = 1 + 0.5 * 1 - 0 = 1.5          A_0 = 1.5 + 0.25 * 2.75 = 2.1875
    never = column(False, False, False)
    advantage = gae(column(1.0, 2.0, 3.0), column(0.0, 1.0, 2.0), column(1.0, 2.0, 4.0), never, never, ~never, 0.5, 0.5)
    torch.testing.assert_close(advantage, column(2.1875, 2.75, 3.0))


def test_a_terminated_episode_is_worth_nothing_more():
    # delta_0 = 1 - 0 = 1 without its next value, and nothing comes over from the next episode.
    ended = column(True, False)
    advantage = gae(column(1.0, 2.0), column(0.0, 1.0), column(9.0, 4.0), ended, ended, column(True, True), 0.5, 0.5)
    torch.testing.assert_close(advantage, column(1.0, 3.0))


def test_a_truncated_episode_bootstraps_from_its_last_observation_and_cuts_the_trace():
    # delta_0 = 1 + 0.5 * 9 - 0 = 5.5: its own next value counts, the next episode's advantage does not.
    advantage = gae(
        column(1.0, 2.0),
        column(0.0, 1.0),
        column(9.0, 4.0),
        column(False, False),
        column(True, False),
        column(True, True),
        0.5,
        0.5,
    )
    torch.testing.assert_close(advantage, column(5.5, 3.0))


def test_a_lost_episode_says_nothing_and_its_values_may_be_anything():
    # The second decision was lost: the first hears of its own next value only, delta_0 = 1 + 0.5 * 1 - 0 = 1.5.
    nan = float("nan")
    kept = column(True, False, True)
    never = column(False, False, False)
    advantage = gae(column(1.0, nan, 3.0), column(0.0, 1.0, 2.0), column(1.0, nan, 4.0), never, never, kept, 0.5, 0.5)
    torch.testing.assert_close(advantage, column(1.5, 0.0, 3.0))


def test_environments_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    reward, value, following = torch.rand(3, 5, 4, generator=generator)
    ended = torch.rand(5, 4, generator=generator) < 0.3
    terminated = ended & (torch.rand(5, 4, generator=generator) < 0.5)
    kept = torch.rand(5, 4, generator=generator) < 0.9
    arrays = (reward, value, following, terminated, ended, kept)
    together = gae(*arrays, 0.9, 0.8)
    alone = [gae(*(x[:, n : n + 1] for x in arrays), 0.9, 0.8) for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone, 1))


def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return():
    # One environment, gamma 0.5: returns 2, 1 + 1 = 2, then a new episode 4, 0 + 2 = 2. Mean 2.5, variance 0.75.
    scale = RewardScale(0.5)
    reward, ended = column(2.0, 1.0, 4.0, 0.0), column(False, True, False, False)
    scale.update(reward, ended)
    assert scale.std == pytest.approx(0.75**0.5)
    torch.testing.assert_close(scale(reward), reward / 0.75**0.5)


def test_the_scale_of_two_iterations_is_that_of_both_together():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 4, 3, generator=generator)
    ended = torch.ones(4, 3, dtype=torch.bool)
    scale = RewardScale(0.9)
    scale.update(first, ended)
    scale.update(second, ended)
    assert scale.std == pytest.approx(torch.cat([first, second]).std(correction=0).item(), rel=1e-6)


def test_an_episode_that_goes_on_is_not_cut_between_iterations():
    reward, ended = torch.rand(6, 3), torch.zeros(6, 3, dtype=torch.bool)
    whole, parts, cut = RewardScale(0.9), RewardScale(0.9), RewardScale(0.9)
    whole.update(reward, ended)
    for scale in (parts, cut):
        scale.update(reward[:4], ended[:4])
    cut.restart()
    for scale in (parts, cut):
        scale.update(reward[4:], ended[4:])
    assert parts.std == pytest.approx(whole.std, rel=1e-5)
    assert cut.std != pytest.approx(whole.std, rel=1e-2)


def test_equal_rewards_and_outliers():
    scale = RewardScale(0.9)
    assert scale(torch.tensor([3.0])).item() == 3.0
    scale.update(torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool))
    assert scale.std == 1.0
    assert scale(torch.tensor([-1e6, 1e6])).tolist() == [-10.0, 10.0]


def test_the_scale_comes_back_from_a_checkpoint():
    scale, other = RewardScale(0.9), RewardScale(0.9)
    scale.update(torch.rand(4, 3), torch.zeros(4, 3, dtype=torch.bool))
    other.load_state_dict(scale.state_dict())
    assert other.std == scale.std
