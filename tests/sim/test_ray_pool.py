"""The Ray back end against the others, with a Ray of this machine that is started once for the whole file."""

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from counting import EXIT, HANG, RAISE, Counting

from flowsteer.sim import backends, ray_connection
from flowsteer.sim.environ import environment
from flowsteer.sim.errors import SimError
from flowsteer.sim.ray_connection import Connection
from flowsteer.sim.ray_pool import Crew
from flowsteer.sim.vec_env import IDLE

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def running():
    # Where the actors find the tasks of the tests.
    with environment({"PYTHONPATH": str(Path(__file__).parent)}):
        ray_connection.CONNECTION.open()
    assert ray.is_initialized()
    yield
    ray_connection.CONNECTION.close()
    assert not ray.is_initialized(), "some pool was not closed, or Ray was left running"


def dealt(task, num_envs, observation_steps=1, **options):
    return backends.ray(task, num_envs, observation_steps, workers=2, **options)


def chunk(*rows):
    """Actions [B, Ta, 1] from B lists."""
    return torch.tensor(rows, dtype=torch.float32)[..., None]


def roll(env, low, high, chunk_steps):
    generator = torch.Generator().manual_seed(0)
    seen = [env.reset(range(17))]
    while any(seed != IDLE for seed in env.seeds):
        actions = low + (high - low) * torch.rand(5, chunk_steps, env.spec.action_dim, generator=generator)
        result = env.step_chunk(actions)
        seen += [result.obs, result.final_obs, result.info]
        seen.append({"sum": result.reward_sum, "end": result.terminated, "limit": result.truncated})
        seen.append({"seeds": torch.tensor(env.seeds)})
    return seen


def assert_same(here, there):
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_actors_give_exactly_what_one_process_gives():
    task = Counting(lengths={s: 1 + 3 * s % 11 for s in range(20)}, limit=8)
    with backends.gym(task, 5, 2) as here, dealt(task, 5, 2) as there:
        assert_same(roll(here, 0, 1, 3), roll(there, 0, 1, 3))


def test_mujoco_worlds_in_actors_are_those_on_threads():
    pytest.importorskip("mujoco")
    from flowsteer.sim.tasks.locomotion import Hopper

    with backends.threads(Hopper(), 5, 2) as here, dealt(Hopper(), 5, 2) as there:
        assert_same(roll(here, -1, 1, 4), roll(there, -1, 1, 4))


def test_worlds_lost_in_actors_are_told_here():
    pytest.importorskip("gymnasium.envs.mujoco", reason="the hopper's model is Gymnasium's")
    from changed_hopper import Like, with_memory

    with dealt(Like(functools.partial(with_memory, 9000)), 3) as env:
        env.reset(range(6))
        with pytest.warns(RuntimeWarning) as told:
            result = env.step_chunk(torch.zeros(3, 4, 3))
    assert result.info["lost"].all()
    assert result.info["env_steps"].tolist() == [1, 1, 1]
    (message,) = (str(warning.message) for warning in told if "hopper" in str(warning.message))
    assert 'are lost: put a larger <size memory="..."/> into its model' in message


def test_an_actor_killed_in_the_middle_costs_its_episodes_and_nothing_else():
    with dealt(Counting(limit=4), 3) as env:
        env.reset(range(6))
        pid = int(re.search(r"process (\d+) on ", env._pool._places[0])[1])
        assert env.step_chunk(chunk([1], [2], [3])).info["env_steps"].tolist() == [1, 1, 1]
        os.kill(pid, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=rf"environments \[0, 2\] died \(.*\), process {pid} on .*takes over"):
            result = env.step_chunk(chunk([1], [2], [1]))
        assert result.info["lost"].tolist() == [True, False, True]
        assert not (result.terminated | result.truncated).any()
        assert result.reward_sum.tolist() == [0, 2, 0]
        assert result.info["seed"].tolist() == [0, 1, 2]
        assert env.seeds == (3, 1, 4)
        assert result.obs["count"][:, 0, :2].tolist() == [[3, 0], [1, 2], [4, 0]]
        result = env.step_chunk(chunk([1], [1], [1]))
        assert result.obs["count"][:, 0, :2].tolist() == [[3, 1], [1, 3], [4, 1]]
        assert not result.info["lost"].any()


def test_an_actor_that_dies_of_its_environment_is_replaced():
    with dealt(Counting(), 2) as env:
        env.reset(range(9))
        with pytest.warns(RuntimeWarning, match=r"environments \[1\] died"):
            assert env.step_chunk(chunk([1], [EXIT])).info["lost"].tolist() == [False, True]
        assert env.seeds == (0, 2)
        assert not env.step_chunk(chunk([1], [1])).info["lost"].any()


def test_an_actor_that_hangs_is_replaced():
    # Long enough for an actor that is only slow, on a busy machine, to answer.
    with dealt(Counting(), 2, timeout_s=8.0) as env:
        env.reset(range(9))
        with pytest.warns(RuntimeWarning, match=r"environments \[0\] did not answer within 8 s"):
            assert env.step_chunk(chunk([HANG], [1])).info["lost"].tolist() == [True, False]
        assert env.seeds == (2, 1)
        assert not env.step_chunk(chunk([1], [1])).info["lost"].any()


@pytest.mark.filterwarnings("ignore:.*new worker takes over:RuntimeWarning")
def test_an_actor_that_keeps_dying_stops_the_run():
    with backends.ray(Counting(deadly_seeds=range(99)), 1, 1, workers=1) as env:
        env.reset(range(99))
        assert env.step_chunk(chunk([1])).info["lost"].all()
        with pytest.raises(SimError, match=r"3 times in a row: see `ray status`, or try sim.backend=gym"):
            env.step_chunk(chunk([1]))


def test_an_error_inside_an_actor_is_told_in_one_line():
    with dealt(Counting(), 1) as env:
        env.reset(range(3))
        with pytest.raises(
            SimError, match="counting: an environment failed in its worker: ValueError: the arm came off"
        ):
            env.step_chunk(chunk([RAISE]))


def test_a_ray_that_was_there_before_lends_its_cpus_and_goes_on(monkeypatch):
    monkeypatch.setattr(ray_connection, "CONNECTION", Connection())
    with pytest.raises(SimError, match=r"the Ray cluster has \d+ CPUs, \d+ of them free, too few for 999 workers"):
        backends.ray(Counting(), 999, 1, workers=999)
    with backends.ray(Counting(), 1, 1, workers=1) as env:
        env.reset(range(1))
        assert env.step_chunk(chunk([1, 1])).info["env_steps"].tolist() == [2]
    assert ray.is_initialized()


def test_cpus_that_others_have_reserved_are_not_counted_until_they_are_free(monkeypatch):
    monkeypatch.setattr(ray_connection, "CONNECTION", Connection())
    cpus = int(ray.cluster_resources()["CPU"])
    other = ray.remote(Crew).options(num_cpus=cpus).remote()
    ray.get(other.__ray_ready__.remote())
    with monkeypatch.context() as patience:
        patience.setattr(ray_connection, "RETURN_TIMEOUT_S", 0.0)
        for workers, wanted in ((None, 1), (1, 1)):
            with pytest.raises(SimError, match=rf"has {cpus} CPUs, 0 of them free, too few for {wanted} workers"):
                backends.ray(Counting(), 4, 1, workers=workers)
    ray.kill(other)
    with backends.ray(Counting(), cpus, 1) as env:
        assert len(env._pool._places) == cpus


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SimError, match=r"Ray cannot be reached at RAY_ADDRESS=127.0.0.1:1: .*refused"):
        Connection().open()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SimError, match=re.escape("pip install 'flowsteer[ray]'")):
        backends.ray(Counting(), 1, 1)


def test_actors_do_not_import_torch():
    code = "import sys, flowsteer.sim.ray_pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
