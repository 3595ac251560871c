import math

import pytest
import torch

from flowsteer.policies.spec import ArraySpec
from flowsteer.sim.actions import ActionCheck
from flowsteer.sim.errors import SimError
from flowsteer.sim.spec import TaskSpec

SPEC = TaskSpec(
    name="reach",
    observations={"state": ArraySpec((2,))},
    action_dim=2,
    action_low=(-1.0, 0.0),
    action_high=(1.0, 5.0),
    control_hz=10.0,
    max_episode_steps=9,
)
CHECK = ActionCheck(SPEC, 3, torch.device("cpu"))
RUNNING = torch.tensor([True, True, False])


def test_actions_are_clipped_to_the_limits_of_each_entry():
    actions = torch.tensor([-3.0, -3.0, 3.0, 3.0, 0.5, 9.0], dtype=torch.float64).view(3, 1, 2)
    chunks, broken, hopeless = CHECK(actions, RUNNING)
    assert chunks.dtype == torch.float32
    assert chunks[:, 0].tolist() == [[-1, 0], [1, 3], [0.5, 5]]
    assert not broken.any()
    assert not hopeless


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_chunk_with_one_bad_number_is_broken_as_a_whole_unless_nothing_runs_there(bad):
    actions = torch.ones(3, 4, 2)
    actions[1:, 3, 0] = bad
    chunks, broken, hopeless = CHECK(actions, RUNNING)
    assert chunks[:, :, 0].tolist() == [4 * [1], 4 * [0], 4 * [0]]
    assert broken.tolist() == [False, True, False]
    assert not hopeless
    CHECK.refuse(bool(hopeless))


def test_a_policy_is_hopeless_where_all_that_run_are_broken():
    actions = torch.ones(3, 1, 2)
    actions[:2] = math.nan
    hopeless = CHECK(actions, RUNNING).hopeless
    with pytest.raises(SimError, match="reach: no environment got finite actions; the policy has diverged"):
        CHECK.refuse(bool(hopeless))
    assert not CHECK(actions, torch.zeros(3, dtype=torch.bool)).hopeless, "nothing runs, so nothing is wrong"


@pytest.mark.parametrize("shape", [(3, 2), (2, 1, 2), (3, 1, 3), (3, 0, 2)])
def test_actions_of_another_shape_are_refused(shape):
    with pytest.raises(SimError, match=r"reach: actions must be \[3, Ta, 2\], got \[" + str(shape[0])):
        CHECK(torch.zeros(shape), RUNNING)
