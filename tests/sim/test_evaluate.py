import math

import pytest
import torch
from counting import EXIT, NAN_OBSERVATION, NAN_REWARD, Counting

from flowsteer.policies.errors import PolicyError
from flowsteer.policies.spec import ArraySpec, PolicySpec
from flowsteer.sim.backends import gym
from flowsteer.sim.errors import SimError
from flowsteer.sim.evaluate import evaluate

COUNT = {"count": ArraySpec((3,))}


class Telling:
    """Predicts 100 (step of the decision) + row, so that an action tells which row of which chunk it was."""

    def __init__(self, to, tp, ta):
        self.spec = PolicySpec(COUNT, 1, to, tp, ta, 10.0)

    def predict(self, obs, *, noise=None, generator=None):
        step = obs["count"][:, -1, 1]
        return (100 * step[:, None] + torch.arange(self.spec.prediction_steps))[..., None]


class Noisy:
    """Predicts the noise it is given plus the seed it observes."""

    spec = PolicySpec(COUNT, 1, 2, 4, 3, 10.0)

    def predict(self, obs, *, noise=None, generator=None):
        assert len(generator) == len(obs["count"])
        return torch.stack([torch.randn(4, 1, generator=one) for one in generator]) + obs["count"][:, -1:, :1]


def executed(policy, delay_steps, num_envs=1, episodes=1, limit=9):
    with gym(Counting(limit=limit), num_envs, policy.spec.observation_steps) as env:
        result = evaluate(policy, env, episodes=episodes, seed=0, delay_steps=delay_steps)
    return [[float(action[0]) for action in episode.actions] for episode in result.episodes]


def test_without_delay_each_chunk_gives_its_ta_rows_from_to_minus_1():
    assert executed(Telling(to=2, tp=6, ta=3), 0) == [[1, 2, 3, 301, 302, 303, 601, 602, 603]]


def test_with_delay_the_previous_chunk_goes_on_until_the_new_one_is_there():
    # Decisions at 0, 3, 6; row 1 is "now". The first takes effect at once, the others 2 steps after their observation.
    assert executed(Telling(to=2, tp=6, ta=3), 2) == [[1, 2, 3, 4, 5, 303, 304, 305, 603]]


def test_a_delay_longer_than_the_executed_steps_keeps_two_chunks_waiting():
    # Decisions at 0, 2, 4, 6, 8 take effect at 0, 5, 7, 9, 11; row 0 is "now".
    assert executed(Telling(to=1, tp=5, ta=2), 3) == [[0, 1, 2, 3, 4, 203, 204, 403, 404]]


def test_every_episode_starts_undelayed_whatever_ran_before_it():
    alone = executed(Telling(to=2, tp=6, ta=3), 2, episodes=3, limit=7)
    assert alone == [[1, 2, 3, 4, 5, 303, 304]] * 3
    assert executed(Telling(to=2, tp=6, ta=3), 2, num_envs=2, episodes=3, limit=7) == alone


@pytest.mark.parametrize("delay", [3, -1])
def test_an_impossible_delay_is_refused_with_both_numbers(delay):
    with pytest.raises(
        SimError, match=rf"delay_steps={delay} needs .* = {4 + delay} steps, the policy predicts 6; .* 0 and 2"
    ):
        executed(Telling(to=2, tp=6, ta=3), delay)


def run(num_envs, episodes=7, policy=None, task=None):
    task = task or Counting(lengths={100 + i: 1 + 2 * i for i in range(7)}, limit=10)
    with gym(task, num_envs, 2) as env:
        return evaluate(policy or Noisy(), env, episodes=episodes, seed=100)


class Remembering:
    """Decides 100 (executed steps) + row, and notes whom it decided for."""

    def __init__(self):
        self.asked = []

    def decide(self, obs, *, executed, rows, generator):
        assert len(generator) == len(rows) == len(executed) == len(obs["count"])
        self.asked.append((rows.tolist(), executed.tolist()))
        return (100 * executed[:, None] + torch.arange(4.0))[..., None]


def test_an_executor_knows_the_rows_and_what_was_executed_of_each():
    executor = Remembering()
    with gym(Counting(lengths={0: 4, 1: 20, 2: 2}, limit=7), 2, 2) as env:
        result = evaluate(Telling(2, 4, 3), env, episodes=3, seed=0, executor=executor)
    # Seed 2 begins in row 0 where seed 0 has ended after a fourth step, and ends inside its first chunk.
    assert executor.asked == [([0, 1], [0, 0]), ([0, 1], [3, 3]), ([0, 1], [0, 3])]
    assert [action.item() for action in result.episodes[1].actions] == [1, 2, 3, 301, 302, 303, 301]
    assert result.decisions == 6


def told(result):
    rows = [(e.seed, e.success, e.reward_sum, e.max_reward, e.length, e.terminated) for e in result.episodes]
    chunks = [(at, chunk.tolist()) for e in result.episodes for at, chunk in e.decisions]
    return rows, chunks, [action.tolist() for e in result.episodes for action in e.actions]


def test_outcomes_do_not_depend_on_the_batch():
    one, three, many = run(1), run(3), run(16)
    assert told(one) == told(three) == told(many)
    assert (one.decision_batch, three.decision_batch, many.decision_batch) == (1, 3, 7)


def test_rows_and_means():
    result = run(3)
    assert [episode.seed for episode in result.episodes] == list(range(100, 107))
    assert [episode.length for episode in result.episodes] == [1, 3, 5, 7, 9, 10, 10]
    assert [episode.terminated for episode in result.episodes] == [True] * 5 + [False] * 2
    assert result.env_steps == 45
    returns = [sum(float(action[0]) for action in episode.actions) for episode in result.episodes]
    assert result.reward_sum.mean == pytest.approx(sum(returns) / 7, rel=1e-6)
    largest = [max(float(action[0]) for action in episode.actions) for episode in result.episodes]
    assert result.max_reward.mean == pytest.approx(sum(largest) / 7, rel=1e-6)
    assert result.success.mean == 0
    assert len(result.decision_s) >= 4


def test_success_at_any_step_counts():
    class Succeeds(Telling):
        def predict(self, obs, *, noise=None, generator=None):
            # Above 500 only in the second decision and only for odd seeds.
            return super().predict(obs) + 200 * (obs["count"][:, -1:, :1] % 2)

    result = run(2, policy=Succeeds(2, 4, 3), task=Counting(limit=8), episodes=4)
    # Decisions at 0, 3, 6: even seeds reach 602, odd ones 802; both succeed. Up to step 5 only odd ones: 503.
    assert [episode.success for episode in result.episodes] == [True] * 4
    result = run(2, policy=Succeeds(2, 4, 3), task=Counting(limit=6), episodes=4)
    assert [episode.success for episode in result.episodes] == [False, True, False, True]
    assert result.success.mean == 0.5


def test_lost_episodes_are_counted_and_left_out_of_the_means():
    class Deadly(Telling):
        def predict(self, obs, *, noise=None, generator=None):
            chunk = torch.ones(len(obs["count"]), 4, 1)
            chunk[obs["count"][:, -1, 0] == 101] = EXIT
            return chunk

    with gym(Counting(limit=5), 2, 2, workers=2) as env, pytest.warns(RuntimeWarning, match="died"):
        result = evaluate(Deadly(2, 4, 3), env, episodes=4, seed=100)
    assert [episode.lost for episode in result.episodes] == [False, True, False, False]
    assert [episode.seed for episode in result.kept] == [100, 102, 103]
    assert result.reward_sum == (5, 5, 5)
    assert result.success.mean == 0
    assert not math.isnan(result.success.high)


@pytest.mark.parametrize("fault", [NAN_REWARD, NAN_OBSERVATION])
def test_an_episode_whose_numbers_are_not_finite_is_lost(fault):
    class Provoking(Telling):
        def predict(self, obs, *, noise=None, generator=None):
            chunk = torch.ones(len(obs["count"]), 4, 1)
            chunk[obs["count"][:, -1, 0] == 101] = fault
            return chunk

    with gym(Counting(limit=5), 2, 2) as env, pytest.warns(RuntimeWarning, match="counting: a reward or observation"):
        result = evaluate(Provoking(2, 4, 3), env, episodes=4, seed=100)
    assert [episode.lost for episode in result.episodes] == [False, True, False, False]
    assert result.reward_sum == (5, 5, 5)
    assert result.max_reward == (1, 1, 1)


def test_progress_is_told_after_every_episode():
    seen = []
    with gym(Counting(lengths={0: 9, 1: 2, 2: 2}, limit=10), 2, 2) as env:
        evaluate(Noisy(), env, episodes=3, seed=0, progress=seen.append)
    assert [(episode.seed, episode.length) for episode in seen] == [(1, 2), (2, 2), (0, 9)]


def test_a_policy_for_something_else_is_refused():
    policy = Telling(2, 4, 3)
    with pytest.raises(SimError, match="the policy observes 2 steps, the environments 1"):
        evaluate(policy, gym(Counting(), 1, 1), episodes=1, seed=0)
    policy.spec = PolicySpec({"state": ArraySpec((5,))}, 1, 2, 4, 3, 10.0)
    with pytest.raises(PolicyError, match=r"needs observation 'state', task 'counting' offers \['count', 'picture'\]"):
        evaluate(policy, gym(Counting(), 1, 2), episodes=1, seed=0)
    with pytest.raises(SimError, match="episodes must be at least 1, got 0"):
        evaluate(Noisy(), gym(Counting(), 1, 2), episodes=0, seed=0)
    with pytest.raises(SimError, match="seed must not be negative, got -2"):
        evaluate(Noisy(), gym(Counting(), 1, 2), episodes=1, seed=-2)
