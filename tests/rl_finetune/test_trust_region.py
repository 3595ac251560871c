import math

import pytest
import torch

from flowsteer.rl_finetune.trust_region import REDUCTIONS, aspo, clamp_through, clip_schedule, kl_estimate, ppo_clip


def test_ppo_by_hand():
    # Ratios 1.5 and 0.5 at a clip of 0.2. A > 0: min(1.5 A, 1.2 A), min(0.5 A, 0.8 A). A < 0: the other way round.
    log_ratio = torch.tensor([1.5, 0.5]).log()
    clip = torch.tensor(0.2)
    torch.testing.assert_close(ppo_clip(log_ratio, torch.tensor([2.0, 2.0]), clip), torch.tensor([-2.4, -1.0]))
    torch.testing.assert_close(ppo_clip(log_ratio, torch.tensor([-2.0, -2.0]), clip), torch.tensor([3.0, 1.6]))


def test_aspo_by_hand():
    # A < 0: -(r A - |A| (r - 1)^2 / (2 eps)) = -(1.5 * -2 - 2 * 0.25 / 0.4) = 4.25; A > 0 as PPO.
    log_ratio, clip = torch.tensor([1.5, 1.5]).log(), torch.tensor(0.2)
    torch.testing.assert_close(aspo(log_ratio, torch.tensor([-2.0, 2.0]), clip), torch.tensor([4.25, -2.4]))


def test_aspo_pulls_back_where_ppo_does_not():
    advantage, clip = torch.tensor([-1.0]), torch.tensor(0.1)
    gradients = []
    for surrogate in (ppo_clip, aspo):
        log_ratio = torch.tensor([math.log(0.5)], requires_grad=True)
        surrogate(log_ratio, advantage, clip).sum().backward()
        gradients.append(log_ratio.grad.item())
    # Descending the loss raises the ratio, back towards 1.
    assert gradients[0] == 0
    assert gradients[1] < 0


def test_the_clip_schedule_of_the_reference():
    expected = [0.001, 0.00119, 0.00145, 0.00181, 0.00232, 0.00303, 0.00401, 0.00539, 0.00732, 0.01]
    assert clip_schedule(0.001, 0.01, 10).tolist() == pytest.approx(expected, abs=5e-6)


def test_one_step_has_the_last_clip():
    assert clip_schedule(0.001, 0.01, 1).tolist() == pytest.approx([0.01])


def test_the_clip_schedule_rises():
    assert bool((clip_schedule(0.01, 0.2, 7).diff() > 0).all())


def test_kl_estimate_by_hand():
    # r = 2: 2 - 1 - log 2; r = 1: 0.
    assert kl_estimate(torch.tensor([math.log(2), 0.0])).item() == pytest.approx((1 - math.log(2)) / 2)


def test_a_straight_through_clamp_has_the_gradient_of_the_identity():
    x = torch.tensor([-5.0, 0.5, 5.0], requires_grad=True)
    clamped = clamp_through(x, -1.0, 1.0)
    assert clamped.tolist() == [-1.0, 0.5, 1.0]
    clamped.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_reductions_by_hand():
    x = torch.arange(8.0).reshape(2, 2, 2)
    assert REDUCTIONS["mean"](x).tolist() == [1.5, 5.5]
    assert REDUCTIONS["sum"](x).tolist() == [6.0, 22.0]
    assert REDUCTIONS["sqrt"](x).tolist() == [3.0, 11.0]
