"""Worlds that cannot go on: lost, told why once, and no other pays for it."""

import functools
import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from changed_hopper import Like, with_memory
from counting import LOSE, NAN_OBSERVATION, NAN_REWARD, Counting

from flowsteer.sim.backends import gym, threads, warp
from flowsteer.sim.chunk import FASTEST, sane
from flowsteer.sim.complaints import WarnOnce
from flowsteer.sim.errors import SimError
from flowsteer.sim.tasks.locomotion import HalfCheetah, Hopper
from flowsteer.sim.tasks.mujoco_task import Judgement, State

mujoco = pytest.importorskip("mujoco", reason="MuJoCo is not installed")
pytest.importorskip("gymnasium.envs.mujoco", reason="the hopper's model is Gymnasium's")

TIGHT = Like(functools.partial(with_memory, 9000))
"""Compiles, and has no room for contacts from the first physics step on."""
in_workers = functools.partial(gym, workers=2)
"""The same in worker processes."""
here = functools.partial(gym, workers=0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where MuJoCo would write MUJOCO_LOG.TXT."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "MuJoCo has written into the folder of the user"


def told(run):
    """The warnings of `run()` and what it returns."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = run()
    return [str(warning.message) for warning in found if warning.category is RuntimeWarning], result


def chunks(env, rounds, chunk_steps=8, seed=0):
    """The results of random chunks."""
    generator = torch.Generator().manual_seed(seed)
    shape = (env.num_envs, chunk_steps, env.spec.action_dim)
    return [env.step_chunk(2 * torch.rand(shape, generator=generator) - 1) for _ in range(rounds)]


@pytest.mark.parametrize("backend", [here, in_workers, threads], ids=["gym", "workers", "threads"])
def test_a_world_whose_contacts_do_not_fit_is_lost_and_the_remedy_is_told_once(backend, capfd):
    with backend(TIGHT, 3, 2) as env:
        env.reset(range(9))
        messages, results = told(lambda: chunks(env, 2))
        assert env.seeds == (6, 7, 8)
    assert messages == [
        "hopper: the contacts of a world did not fit into memory; the episodes that met it are lost: "
        'put a larger <size memory="..."/> into its model'
    ]
    for result in results:
        assert result.info["lost"].all()
        assert not (result.terminated | result.truncated).any()
        assert result.info["env_steps"].tolist() == [1, 1, 1]
        assert result.reward_sum.tolist() == result.info["reward_max"].tolist() == [0, 0, 0]
        assert result.final_obs["state"].isfinite().all()
    captured = capfd.readouterr()
    assert "WARNING" not in captured.out + captured.err


@pytest.mark.parametrize("backend", [here, threads], ids=["gym", "threads"])
def test_one_world_that_blows_up_costs_its_episode_alone(backend):
    with backend(Hopper(), 3, 1) as env:
        env.reset(range(9))
        if backend is threads:
            env._pool.states[1, 1 + 6] = np.nan
        else:
            env._pool._slots[1]._env._data.qvel[0] = np.nan
        messages, (result,) = told(lambda: chunks(env, 1, chunk_steps=4))
        assert env.seeds == (0, 3, 2)
        fresh = result.obs["state"][1, 0]
        assert not chunks(env, 1, chunk_steps=1)[0].info["lost"].any()
        torch.testing.assert_close(env.reset([3, 3, 3])["state"][1, 0], fresh, rtol=0, atol=0)
    assert result.info["lost"].tolist() == [False, True, False]
    assert result.info["env_steps"].tolist() == [4, 1, 4]
    assert result.info["reward_max"][1] == 0
    assert result.reward_sum.isfinite().all()
    (message,) = messages
    assert message.startswith("hopper: the physics of a world diverged (Nan, Inf or huge value in Q")
    assert message.endswith("are lost: act more gently, narrow task.randomize or shorten the model's timestep")


def test_a_randomised_world_that_explodes_is_lost_alike_whatever_the_back_end_and_the_chunk():
    task = HalfCheetah(randomize={"body_mass": (0.01, 3), "actuator_gear": (1, 20)})
    actions = 2 * torch.rand(8, 48, 6, generator=torch.Generator().manual_seed(0)) - 1
    lost = {}
    for name, backend, steps in (("gym", here, 6), ("threads", threads, 6), ("long", threads, 24)):
        with backend(task, 8, 1) as env, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env.reset(range(8))
            ended = torch.zeros(8, dtype=torch.bool)
            when = torch.zeros(8, dtype=torch.int64)
            for part in actions.split(steps, dim=1):
                result = env.step_chunk(torch.where(ended[:, None, None], 0, part))
                assert result.reward_sum[~ended].abs().max() < FASTEST
                when += torch.where(ended, 0, result.info["env_steps"])
                ended |= result.info["lost"]
        lost[name] = torch.where(ended, when, -1).tolist()
    assert max(lost["gym"]) > 0, "nothing has exploded: the test compares nothing"
    assert lost["threads"] == lost["long"] == lost["gym"]


class Rubbing(Like):
    """A hopper without contacts, with more constraints than when it was compiled."""

    def load(self):
        model = super().load()
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
        model.dof_frictionloss[:] = 1
        return model


@pytest.mark.parametrize("backend", [here, threads], ids=["gym", "threads"])
def test_a_model_that_mujoco_cannot_step_at_all_is_an_error_of_one_line(backend):
    errors = []
    # From too little for any warning to too much for an error.
    for size in range(3000, 5001, 250):
        try:
            with warnings.catch_warnings(), backend(Rubbing(functools.partial(with_memory, size)), 2, 1) as env:
                warnings.simplefilter("ignore")
                env.reset(itertools.count())
                chunks(env, 1)
        except SimError as error:
            errors.append(str(error))
    assert errors
    for error in errors:
        assert re.fullmatch(r"hopper: MuJoCo stopped \(.*memory.*\): put a larger <size memory.*", error)


def test_a_model_that_does_not_compile_for_want_of_memory_is_an_error_of_one_line():
    with pytest.raises(SimError, match=r"hopper: MuJoCo stopped .*: put a larger <size memory") as error:
        threads(Like(functools.partial(with_memory, 600)), 1, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [here, threads], ids=["gym", "threads"])
def test_a_reward_that_is_not_finite_is_the_tasks_fault_and_costs_the_episode(backend):
    def judge(xp, before, actions, after):
        wrong = actions[..., 0] > 0.5
        reward = xp.where(wrong, float("nan"), 1.0)
        return Judgement(reward, wrong, wrong)

    task = Like(functools.partial(with_memory, 10**6))
    task.judge = judge
    actions = torch.zeros(2, 4, 3)
    actions[1, 2, 0] = 1
    with backend(task, 2, 1) as env:
        env.reset(range(3))
        messages, result = told(lambda: env.step_chunk(actions))
    assert result.info["lost"].tolist() == [False, True]
    assert result.info["env_steps"].tolist() == [4, 3]
    assert result.info["reward_max"].tolist() == [1, 1]
    assert result.reward_sum[0] == 4
    assert result.reward_sum[1].isnan()
    assert not (result.terminated | result.truncated).any()
    assert messages == [
        "hopper: a reward or observation was not finite; the episodes that met it are lost: mend the task"
    ]


@pytest.mark.parametrize("backend", [here, threads], ids=["gym", "threads"])
def test_an_observation_that_is_not_finite_costs_the_episode(backend):
    def observe(xp, state):
        shown = Hopper().observe(xp, state)["state"]
        return {"state": xp.where(state.qvel[..., :1] > 100, float("nan"), shown)}

    task = Like(functools.partial(with_memory, 10**6))
    task.observe = observe
    with backend(task, 2, 2) as env:
        env.reset(range(3))
        if backend is threads:
            env._pool.states[1, 1 + 6] = 1000
        else:
            env._pool._slots[1]._env._data.qvel[0] = 1000
        messages, (result,) = told(lambda: chunks(env, 1, 1))
    assert result.info["lost"].tolist() == [False, True]
    assert not (result.terminated | result.truncated).any()
    assert "mend the task" in messages[0]


@pytest.mark.parametrize("backend", [here, in_workers], ids=["gym", "workers"])
@pytest.mark.parametrize(
    ("bad", "reward", "steps"), [(LOSE, 1, 2), (NAN_REWARD, math.nan, 2), (NAN_OBSERVATION, 1 + NAN_OBSERVATION + 1, 3)]
)
def test_an_environment_may_lose_its_episode(backend, bad, reward, steps):
    with backend(Counting(limit=3), 2, 2) as env:
        env.reset(range(9))
        messages, result = told(lambda: env.step_chunk(torch.tensor([[1, 1, 1], [1, bad, 1.0]])[..., None]))
        assert env.seeds == (2, 3)
    assert result.info["lost"].tolist() == [False, True]
    assert result.truncated.tolist() == [True, False]
    assert result.info["env_steps"].tolist() == [3, steps]
    assert result.info["reward_max"][1] == 1
    np.testing.assert_equal(result.reward_sum.tolist(), [3, reward])
    assert result.obs["count"].isfinite().all()
    assert len(messages) == 1


def test_actions_that_are_not_finite_are_told_once():
    with here(Counting(), 2, 1) as env:
        env.reset(range(9))
        bad = torch.tensor([[1.0], [math.nan]])[..., None]
        messages, _ = told(lambda: [env.step_chunk(bad) for _ in range(2)])
    assert messages == ["counting: some actions were not finite; the episodes that met them are lost: mend the policy"]


def test_a_first_step_that_loses_everything_has_no_reward_in_warp_either():
    pytest.importorskip("mujoco_warp", reason="MuJoCo Warp is not installed")
    env = warp(Hopper(), 2, 1)
    env.reset(range(4))
    env._worlds.qvel[1] = torch.nan
    result = env.step_chunk(torch.zeros(2, 2, 3))
    assert result.info["reward_max"][1] == 0
    assert result.info["lost"].tolist() == [False, True]
    assert result.final_obs["state"].isfinite().all()
    messages, _ = told(lambda: env.step_chunk(torch.zeros(2, 2, 3)))
    assert [message.partition(";")[0] for message in messages] == ["hopper: the physics of a world diverged"]
    assert told(env.close) == ([], None)


def test_soundness_is_bounded_and_finite_numbers():
    state = State(np.zeros((5, 2)), np.zeros((5, 2)), np.zeros((5, 1)))
    state.qpos[1, 0], state.qpos[2, 1] = 2e10, np.nan
    state.qvel[3, 1] = -2 * FASTEST
    state.sensors[4, 0] = np.inf
    assert sane(np, state).tolist() == [True, False, False, False, False]
    assert sane(torch, State(*map(torch.from_numpy, state))).tolist() == [True, False, False, False, False]


def test_a_remedy_is_told_once_whatever_its_number():
    warn = WarnOnce()
    causes = ['a: 3 of them: put <size njmax="3"/>', 'a: 5 of them: put <size njmax="5"/>', "b: put another"]
    messages, _ = told(lambda: (warn(causes), warn(causes)))
    assert messages == [causes[0], causes[2]]
