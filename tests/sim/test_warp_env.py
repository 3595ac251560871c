"""MuJoCo Warp on a CPU against the thread back end. Its kernels are compiled at first use, in a minute or so."""

import itertools
import re
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from changed_hopper import Like
from counting import Counting

from flowsteer.sim.backends import threads, warp
from flowsteer.sim.errors import SimError
from flowsteer.sim.start_queue import Start, StartQueue
from flowsteer.sim.tasks.arm_lift import ArmLift
from flowsteer.sim.tasks.locomotion import HalfCheetah, Hopper, Walker2d
from flowsteer.sim.tasks.pusht_mj import PushTMujoco
from flowsteer.sim.vec_env import IDLE

mujoco = pytest.importorskip("mujoco", reason="MuJoCo is not installed")
mujoco_warp = pytest.importorskip("mujoco_warp", reason="MuJoCo Warp is not installed: pip install 'flowsteer[warp]'")
pytest.importorskip("gymnasium.envs.mujoco", reason="the hopper's model is Gymnasium's")

B, To = 5, 3
SINK = 0.02
"""Metres that bring a hopper from its start onto the ground."""


def limited(**sizes):
    """A hopper with these attributes of `<size>`."""

    def change(spec):
        for name, size in sizes.items():
            setattr(spec, name, size)

    return Like(change)


@pytest.fixture(scope="module")
def env():
    """Five hoppers; whoever uses them resets them first."""
    with warp(Hopper(), B, To) as env:
        yield env


def chunk(chunk_steps, generator=None, num_envs=B):
    return 2 * torch.rand(num_envs, chunk_steps, 3, generator=generator) - 1


def roll(env, chunk_steps, chunks, episodes=12):
    """Everything that 5 environments show."""
    generator = torch.Generator().manual_seed(0)
    seen = [env.reset(range(episodes))]
    for _ in range(chunks):
        result = env.step_chunk(chunk(chunk_steps, generator))
        seen += [result.obs, result.final_obs, result.info]
        seen.append({"sum": result.reward_sum, "end": result.terminated, "limit": result.truncated})
        seen.append({"seeds": torch.tensor(env.seeds)})
    return seen


# The chaos of the cheetah's contacts blows the rounding of float32 up to 1 within 20 steps.
@pytest.mark.parametrize(
    ("make", "steps"),
    [(Hopper, 20), (Walker2d, 20), (HalfCheetah, 8), (PushTMujoco, 20), (ArmLift, 20)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_steps_equal_those_on_threads_also_after_a_fall(make, steps, monkeypatch):
    if make is ArmLift:
        pytest.importorskip("robosuite", reason="robosuite's models are not installed")
    task, generator = make(), torch.Generator().manual_seed(1)
    judge = task.judge
    monkeypatch.setattr(task, "judge", lambda *args: endless(judge(*args)))
    low, high = torch.tensor(task.spec.action_low), torch.tensor(task.spec.action_high)
    with warp(task, B, To) as env, threads(task, B, To) as other:
        seeds = range(100, 100 + B)
        torch.testing.assert_close(env.reset(seeds), other.reset(seeds), rtol=1e-5, atol=1e-4)
        for _ in range(steps // 4):
            actions = low + (high - low) * torch.rand(B, 4, len(low), generator=generator)
            result, wanted = env.step_chunk(actions), other.step_chunk(actions)
            assert not (result.ended | wanted.ended).any(), "an episode ended: fewer steps are compared"
            torch.testing.assert_close(result.reward_sum, wanted.reward_sum, rtol=0, atol=1e-3)
            torch.testing.assert_close(result.obs, wanted.obs, rtol=0, atol=1e-3)


def endless(judgement):
    """Without an end by rule."""
    return judgement._replace(terminated=judgement.terminated & False)


def test_episodes_end_and_follow_each_other_as_on_threads(env):
    with threads(Hopper(), B, To) as other:
        ours, theirs = roll(env, 7, 6), roll(other, 7, 6)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=2e-3, atol=2e-3)
    assert sum(int(result["end"].sum()) for result in ours if "end" in result) >= 5
    assert (ours[-1]["seeds"] == IDLE).any(), "no environment ran out of seeds"


def test_the_time_limit_counts_steps_of_all_chunks(env, monkeypatch):
    monkeypatch.setattr(env, "spec", replace(env.spec, max_episode_steps=5))
    env.reset(range(2 * B))
    still = torch.zeros(B, 3, 3)
    assert not env.step_chunk(still).ended.any()
    result = env.step_chunk(still)
    assert result.truncated.all()
    assert not result.terminated.any()
    assert result.info["env_steps"].tolist() == B * [2]
    assert env.seeds == tuple(range(B, 2 * B))


def test_a_seed_gives_the_same_episode_wherever_and_whenever_it_runs(env):
    actions = chunk(6, torch.Generator().manual_seed(2))[:1].expand(B, -1, -1)
    first = env.reset([3, 4, 5, 6, 7])
    after = env.step_chunk(actions)
    again = env.reset(itertools.chain([7, 6, 5, 4, 3], itertools.count(50)))
    torch.testing.assert_close(again["state"], first["state"].flip(0), rtol=0, atol=0)
    torch.testing.assert_close(env.step_chunk(actions).obs["state"], after.obs["state"].flip(0), rtol=0, atol=0)


def test_views_are_warps_own_memory(env):
    worlds = env._worlds
    data = worlds._data
    for view, array in ((worlds.qpos, data.qpos), (worlds.qvel, data.qvel), (worlds.ctrl, data.ctrl)):
        assert view.data_ptr() == array.ptr
    worlds.qpos[1, 1] = 1.5
    assert data.qpos.numpy()[1, 1] == 1.5
    with warp(ArmLift(), 2, 1) as arm:
        assert arm._worlds.sensors.data_ptr() == arm._worlds._data.sensordata.ptr
        assert arm._worlds.sensors.shape == (2, 7)


def test_a_world_that_blows_up_is_lost_and_leaves_no_trace(env):
    env.reset(range(B + 1))
    env._worlds.qpos[:, 1] -= SINK
    env.step_chunk(torch.zeros(B, 2, 3))
    assert (env._worlds._data.nefc.numpy() > 0).all(), "no contact for the NaN to get into"
    env._worlds.qvel[1] = torch.nan
    result = env.step_chunk(torch.zeros(B, 2, 3))
    assert result.info["lost"].tolist() == [False, True, False, False, False]
    assert result.info["env_steps"].tolist() == [2, 1, 2, 2, 2]
    assert not (result.terminated | result.truncated)[1]
    assert result.reward_sum[1] == 0
    assert result.reward_sum.isfinite().all()
    assert env.seeds[1] == B
    same = env.reset(B * [7])["state"]
    env._worlds.qpos[:, 1] -= SINK
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=0)
    same = env.step_chunk(torch.zeros(B, 4, 3)).obs["state"]
    assert same.isfinite().all()
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=0)


def test_actions_that_are_not_finite_cost_that_episode_and_no_other(env):
    env.reset(range(B + 1))
    actions = torch.zeros(B, 2, 3)
    actions[2, 1, 0] = torch.nan
    result = env.step_chunk(actions)
    assert result.info["lost"].tolist() == [False, False, True, False, False]
    assert result.info["env_steps"].tolist() == [2, 2, 0, 2, 2]
    assert result.info["reward_max"][2] == 0
    assert env.seeds == (0, 1, B, 3, 4)
    before = env._worlds.qpos.clone()
    with pytest.raises(SimError, match="hopper: no environment got finite actions; the policy has diverged"):
        env.step_chunk(torch.full((B, 2, 3), torch.nan))
    torch.testing.assert_close(env._worlds.qpos, before, rtol=0, atol=0)


def test_actions_of_the_wrong_shape_are_refused(env):
    env.reset(range(B))
    for shape in ([B, 3], [B + 1, 4, 3], [B, 4, 2], [B, 0, 3]):
        with pytest.raises(SimError, match=rf"actions must be \[{B}, Ta, 3\], got "):
            env.step_chunk(torch.zeros(shape))


@pytest.mark.parametrize(("sizes", "unit"), [({"nconmax": 1, "njmax": 62}, "contacts"), ({"njmax": 1}, "constraints")])
def test_buffers_that_are_too_small_are_told_once_and_cost_the_episodes(sizes, unit, capfd):
    # A hopper that stands has 2 contacts with 4 constraints each.
    size = next(iter(sizes))
    env = warp(limited(**sizes), 2, 1)
    env.reset(itertools.count())
    env._worlds.qpos[:, 1] -= SINK
    lost = torch.zeros(2, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            result = env.step_chunk(torch.zeros(2, 2, 3))
            env._worlds.qpos[:, 1] -= SINK
            assert not (result.info["lost"] & (result.terminated | result.truncated)).any()
            lost |= result.info["lost"]
        env.close()
    assert lost.all()
    (message,) = (str(warning.message) for warning in told if warning.category is RuntimeWarning)
    assert re.match(rf'hopper: .* {unit}.* fit; .* lost: put <size {size}="\d+"/> or more into its model', message)
    assert "overflow" not in capfd.readouterr().out, "Warp tells it again for each world and step"


def test_room_is_made_for_all_that_the_geoms_can_make():
    # Four capsules on a plane and three pairs of capsules, 2 contacts each of 4 constraints; 3 joints with 2 limits.
    with warp(Hopper(), 3, 1) as env:
        assert (env._worlds._data.naconmax, env._worlds._data.njmax) == (3 * 14, 14 * 4 + 3 * 2)


@pytest.mark.parametrize("task", [Walker2d(), HalfCheetah(), PushTMujoco(), ArmLift()], ids=lambda task: task.spec.name)
def test_every_task_is_accepted_and_shows_the_start_of_its_seed(task):
    if isinstance(task, ArmLift):
        pytest.importorskip("robosuite", reason="robosuite's models are not installed")
    with warp(task, 2, 2) as env, threads(task, 2, 2) as other:
        torch.testing.assert_close(env.reset([3, 4]), other.reset([3, 4]), rtol=1e-5, atol=1e-4)


def test_4096_worlds_of_pusht_fit_into_8_gb():
    # A world's arrays do not depend on how many there are.
    bytes_of = {}
    for worlds in (16, 32):
        with warp(PushTMujoco(), worlds, 1) as env:
            bytes_of[worlds] = env._worlds.memory_bytes()
    per_world = (bytes_of[32] - bytes_of[16]) / 16
    assert 4096 * per_world < 8e9


PARKED = Start(torch.tensor(IDLE), torch.zeros(6), torch.zeros(6), torch.zeros(1))


def number(seeds):
    """Of worlds that differ in one number, ten times the seed."""
    return 10.0 * torch.tensor(seeds)[:, None]


def test_starts_are_handed_out_in_order_and_only_once():
    task = Hopper()
    queue = StartQueue(task, 3, range(10, 15), PARKED, number)
    everyone, some = torch.tensor([True, True, True]), torch.tensor([True, False, True])
    assert queue.take(everyone).seed.tolist() == [10, 11, 12]
    queue.drop(int(queue.taken))
    queue.refill()
    start = queue.take(some)
    assert start.seed[some].tolist() == [13, 14]
    assert start.fields[some].tolist() == [[130], [140]]
    wanted_qpos, wanted_qvel = task.initial(np, task.draws([13, 14]))
    np.testing.assert_allclose(start.qpos[some], wanted_qpos, atol=1e-6)
    np.testing.assert_allclose(start.qvel[some], wanted_qvel, atol=1e-6)
    last = queue.take(some)
    assert last.seed[some].tolist() == [IDLE, IDLE]
    assert last.fields[some].tolist() == [[0], [0]]


def test_starts_are_drawn_for_two_chunks_ahead():
    seeds = itertools.count()
    queue = StartQueue(Hopper(), 4, seeds, PARKED, number)
    for _ in range(2):
        queue.take(torch.ones(4, dtype=torch.bool))
        queue.drop(4)
    assert next(seeds) == 8
    queue.refill()
    assert queue.take(torch.ones(4, dtype=torch.bool)).seed.tolist() == [9, 10, 11, 12]


def test_models_that_warp_lacks_are_refused():
    def slippery(spec):
        spec.option.noslip_iterations = 3

    with pytest.raises(
        SimError, match=r"hopper: MuJoCo Warp lacks what its model needs \(noslip .*choose sim.backend=threads"
    ):
        warp(Like(slippery), 1, 1)


def test_height_fields_are_refused_as_warp_drops_their_contacts_without_a_word():
    def hilly(spec):
        spec.add_hfield(name="hills", nrow=2, ncol=2, size=[1, 1, 1, 0.1], userdata=[0, 1, 0, 1])
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_HFIELD, hfieldname="hills", pos=[5, 0, -1])

    with pytest.raises(SimError, match=r"hopper: MuJoCo Warp .*height fields.*choose sim.backend=threads"):
        warp(Like(hilly), 1, 1)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(SimError, match=re.escape("pip install 'flowsteer[warp]'")):
        warp(Hopper(), 1, 1)


def test_a_full_memory_names_the_remedy(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("Failed to allocate 99999999999 bytes on device 'cuda:0'")

    monkeypatch.setattr(mujoco_warp, "make_data", full)
    with pytest.raises(SimError, match=r"hopper: 7 worlds do not fit .* take fewer with sim.num_envs"):
        warp(Hopper(), 7, 1)


def test_what_cannot_run_is_refused():
    with pytest.raises(SimError, match=r"counting: only MuJoCo tasks run in MuJoCo Warp; choose sim.backend=gym"):
        warp(Counting(), 1, 1)
    with pytest.raises(SimError, match=r"warp has no workers: leave sim.workers out"):
        warp(Hopper(), 1, 1, workers=2)
    with pytest.raises(SimError, match="num_envs must be at least 1, got 0"):
        warp(Hopper(), 0, 1)
    with pytest.raises(SimError, match="hopper: MuJoCo Warp has no device 'cuda:99' here: choose cpu"):
        warp(Hopper(), 1, 1, device="cuda:99")


def test_a_closed_environment_says_so():
    env = warp(Hopper(), 1, 1)
    env.close()
    env.close()
    with pytest.raises(SimError, match="closed"):
        env.reset([0])
