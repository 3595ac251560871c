"""The moving average against hand computation and against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from flowsteer.policies.ema import Ema


def test_decay_warms_up() -> None:
    ema = Ema(nn.Linear(1, 1), power=0.5, max_decay=0.6)
    decays = []
    for _ in range(8):
        decays.append(ema.decay())
        ema.updates += 1
    assert decays[:3] == [0.0, pytest.approx(1 - 2**-0.5), pytest.approx(1 - 3**-0.5)]
    assert decays[-1] == 0.6


def test_update_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = Ema(module, power=1.0)
    for value in (2.0, 4.0):
        module.weight.data.fill_(value)
        ema.update(module)
    # d = 0 takes the first value whole; d = 1 - 1/2 then averages it with the second.
    assert ema.average.weight.item() == 3.0


def test_equals_diffusers() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    ours = Ema(module, power=0.75, max_decay=0.95)
    theirs = EMAModel(module.parameters(), decay=0.95, use_ema_warmup=True, power=0.75)
    for _ in range(60):
        for parameter in module.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        ours.update(module)
        theirs.step(module.parameters())
    for a, b in zip(ours.average.parameters(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(a, b)


def test_the_average_is_a_copy_that_does_not_train() -> None:
    module = nn.Dropout(0.5)
    assert not Ema(module).average.training
    assert module.training
