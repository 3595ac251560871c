import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from counting import EXIT, HANG, RAISE, Counting

from flowsteer.sim.backends import gym
from flowsteer.sim.errors import SimError
from flowsteer.sim.vec_env import IDLE


def chunk(*rows):
    """Actions [B, Ta, 1] from B lists."""
    return torch.tensor(rows, dtype=torch.float32)[..., None]


def counts(obs):
    """The (seed, step) pairs [B, To] of an observation."""
    return [[(int(seed), int(t)) for seed, t, _ in window] for window in obs["count"]]


def test_observations_start_with_the_first_one_repeated_and_then_hold_the_last_steps():
    env = gym(Counting(), 1, 3)
    assert counts(env.reset([7])) == [[(7, 0)] * 3]
    assert counts(env.step_chunk(chunk([1, 2])).obs) == [[(7, 0), (7, 1), (7, 2)]]
    result = env.step_chunk(chunk([3, 4, 5, 6]))
    assert counts(result.obs) == [[(7, 4), (7, 5), (7, 6)]]
    assert result.obs["count"][0, :, 2].tolist() == [4, 5, 6]
    assert result.obs["picture"].dtype == torch.uint8
    assert result.obs["picture"].shape == (1, 3, 2, 2, 3)


def test_a_chunk_stops_at_the_episodes_end():
    env = gym(Counting(lengths={0: 2}, limit=3), 2, 1)
    env.reset(range(4))
    result = env.step_chunk(chunk([5, 600, 90, 90], [-4, -3, -9, 90]))
    assert result.reward_sum.tolist() == [605, -16]
    assert result.info["reward_max"].tolist() == [600, -3]
    assert result.info["env_steps"].tolist() == [2, 3]
    assert result.info["success"].tolist() == [True, False]
    assert result.terminated.tolist() == [True, False]
    assert result.truncated.tolist() == [False, True]
    assert result.ended.all()
    assert counts(result.final_obs) == [[(0, 2)], [(1, 3)]]
    assert counts(result.obs) == [[(2, 0)], [(3, 0)]]
    assert result.info["seed"].tolist() == [0, 1]
    assert env.seeds == (2, 3)


def test_an_end_by_rule_at_the_last_permitted_step_is_terminated_only():
    env = gym(Counting(lengths={0: 3}, limit=3), 1, 1)
    env.reset([0])
    result = env.step_chunk(chunk([1, 1, 1]))
    assert (result.terminated.tolist(), result.truncated.tolist()) == ([True], [False])


def test_the_time_limit_counts_steps_of_all_chunks():
    env = gym(Counting(limit=5), 1, 2)
    env.reset([0])
    assert not env.step_chunk(chunk([1, 1])).ended.any()
    assert not env.step_chunk(chunk([1, 1])).ended.any()
    result = env.step_chunk(chunk([1, 1]))
    assert result.truncated.all()
    assert result.info["env_steps"].tolist() == [1]
    assert counts(result.final_obs) == [[(0, 4), (0, 5)]]


def test_environments_stay_idle_when_the_seeds_run_out():
    env = gym(Counting(lengths={0: 1, 1: 4, 2: 1}), 3, 1)
    env.reset(range(2))
    assert env.seeds == (0, 1, IDLE)
    result = env.step_chunk(chunk([1, 1], [1, 1], [1, 1]))
    assert result.info["active"].tolist() == [True, True, False]
    assert result.info["env_steps"].tolist() == [1, 2, 0]
    assert env.seeds == (IDLE, 1, IDLE)
    result = env.step_chunk(chunk([float("nan")] * 2, [1, 1], [float("nan")] * 2))
    assert result.reward_sum.tolist() == [0, 2, 0]
    assert result.terminated.tolist() == [False, True, False]
    assert env.seeds == (IDLE,) * 3


def test_a_second_reset_starts_over():
    env = gym(Counting(), 2, 1)
    env.reset(itertools.count())
    env.step_chunk(chunk([1], [1]))
    assert counts(env.reset([8, 9])) == [[(8, 0)], [(9, 0)]]


def test_actions_are_clipped_to_the_limits():
    env = gym(Counting(), 1, 1)
    env.reset([0])
    assert env.step_chunk(chunk([5000, -5000])).obs["count"][0, 0, 2] == -1000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_actions_that_are_not_finite_cost_that_episode_and_no_other(bad):
    env = gym(Counting(), 2, 1)
    env.reset([5, 6, 7])
    result = env.step_chunk(chunk([1, 1], [1, bad]))
    assert result.info["lost"].tolist() == [False, True]
    assert result.info["env_steps"].tolist() == [2, 0]
    assert not (result.terminated | result.truncated).any()
    assert counts(result.obs) == [[(5, 2)], [(7, 0)]]
    assert env.seeds == (5, 7)


def test_where_no_action_is_finite_the_policy_is_to_blame():
    env = gym(Counting(), 3, 1)
    env.reset([5, 6])
    with pytest.raises(SimError, match="counting: no environment got finite actions; the policy has diverged"):
        env.step_chunk(chunk([1, float("nan")], [float("inf"), 1], [1, 1]))
    assert env.step_chunk(chunk([1, 1], [1, 1], [1, 1])).obs["count"][:2, 0, 1].tolist() == [2, 2]


def test_actions_of_the_wrong_shape_are_refused():
    env = gym(Counting(), 2, 1)
    env.reset([5, 6])
    for shape in ([2, 1], [3, 4, 1], [2, 4, 2], [2, 0, 1]):
        with pytest.raises(SimError, match=r"actions must be \[2, Ta, 1\], got "):
            env.step_chunk(torch.zeros(shape))


@pytest.mark.parametrize(
    ("num_envs", "observation_steps", "workers", "message"),
    [
        (0, 2, None, "num_envs must be at least 1, got 0"),
        (1, -1, None, "observation_steps must be at least 1, got -1"),
        (1, 1, -1, "workers must be at least 0, got -1"),
    ],
)
def test_sizes_out_of_range_are_named(num_envs, observation_steps, workers, message):
    with pytest.raises(SimError, match=message):
        gym(Counting(), num_envs, observation_steps, workers=workers)


def roll(workers):
    generator = torch.Generator().manual_seed(0)
    seen = []
    with gym(Counting(lengths={s: 1 + 3 * s % 11 for s in range(20)}, limit=8), 5, 2, workers=workers) as env:
        seen.append(env.reset(range(17)))
        while any(seed != IDLE for seed in env.seeds):
            result = env.step_chunk(torch.rand(5, 3, 1, generator=generator))
            seen += [result.obs, result.final_obs, result.info]
            seen.append({"sum": result.reward_sum, "end": result.terminated, "limit": result.truncated})
            seen.append({"seeds": torch.tensor(env.seeds)})
    return seen


def test_workers_give_exactly_what_one_process_gives():
    alone, shared = roll(workers=0), roll(workers=2)
    assert len(alone) == len(shared)
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_dead_worker_costs_its_episodes_and_nothing_else():
    with gym(Counting(limit=4), 3, 1, workers=2) as env:
        env.reset(range(6))
        with pytest.warns(
            RuntimeWarning, match=r"the worker of environments \[0, 2\] died \(process \d+, exit code 3\)"
        ):
            result = env.step_chunk(chunk([EXIT], [2], [1]))
        assert result.info["lost"].tolist() == [True, False, True]
        assert result.ended.tolist() == [True, False, True]
        assert not (result.terminated | result.truncated).any()
        assert result.reward_sum.tolist() == [0, 2, 0]
        assert result.info["seed"].tolist() == [0, 1, 2]
        assert env.seeds == (3, 1, 4)
        assert counts(result.obs) == [[(3, 0)], [(1, 1)], [(4, 0)]]
        result = env.step_chunk(chunk([1], [1], [1]))
        assert counts(result.obs) == [[(3, 1)], [(1, 2)], [(4, 1)]]
        assert not result.info["lost"].any()


def test_a_worker_killed_between_chunks_and_one_that_hangs_are_replaced():
    with gym(Counting(), 2, 1, workers=2, timeout_s=1.0) as env:
        env.reset(itertools.count())
        os.kill(env._pool._workers[1].process.pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=r"environments \[1\] died .* exit code -9"):
            assert env.step_chunk(chunk([1], [1])).info["lost"].tolist() == [False, True]
        started = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"environments \[0\] did not answer within 1 s"):
            assert env.step_chunk(chunk([HANG], [1])).info["lost"].tolist() == [True, False]
        assert time.monotonic() - started < 60
        assert env.seeds == (3, 2)
        assert not env.step_chunk(chunk([1], [1])).info["lost"].any()


def test_a_death_in_reset_is_told_by_the_next_chunk():
    with gym(Counting(deadly_seeds=[1]), 2, 1, workers=2) as env:
        with pytest.warns(RuntimeWarning, match=r"environments \[1\] died"):
            env.reset(range(3))
        result = env.step_chunk(chunk([1], [1]))
        assert result.info["lost"].tolist() == [False, True]
        assert env.seeds == (0, 2)
        assert not env.step_chunk(chunk([1], [1])).info["lost"].any()


@pytest.mark.filterwarnings("ignore:.*new worker takes over:RuntimeWarning")
def test_a_worker_that_keeps_dying_stops_the_run():
    with gym(Counting(deadly_seeds=range(99)), 1, 1, workers=1) as env:
        env.reset(range(99))
        assert env.step_chunk(chunk([1])).info["lost"].all()
        with pytest.raises(SimError, match="3 times in a row: the simulator cannot run here"):
            env.step_chunk(chunk([1]))


def test_workers_that_hang_share_the_time_that_closing_gives_them(monkeypatch):
    env = gym(Counting(), 2, 1, workers=2)
    env.reset(range(2))
    granted = []
    for i, worker in env._pool._workers.items():
        worker.send("run", {i: np.array([[HANG]], dtype=np.float32)})
        monkeypatch.setattr(
            worker, "end", lambda patience_s, end=worker.end: (granted.append(patience_s), end(patience_s))
        )
    env.close()
    assert granted == [pytest.approx(2.0, abs=0.1), pytest.approx(0.0, abs=0.1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_environment_says_so(workers):
    env = gym(Counting(), 1, 1, workers=workers)
    env.reset(range(3))
    env.close()
    env.close()
    for use in (lambda: env.reset(range(3)), lambda: env.step_chunk(chunk([1]))):
        with pytest.raises(SimError, match="counting: this environment is closed"):
            use()


def test_an_error_inside_a_worker_is_told_in_one_line():
    with gym(Counting(), 1, 1, workers=1) as env:
        env.reset(range(3))
        with pytest.raises(
            SimError, match="counting: an environment failed in its worker: ValueError: the arm came off"
        ):
            env.step_chunk(chunk([RAISE]))
        env.close()


def test_workers_do_not_import_torch():
    code = "import sys, flowsteer.sim.worker_process, flowsteer.sim.tasks.pusht; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
