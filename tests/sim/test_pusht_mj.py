"""Push-T in MuJoCo beside gym-pusht and the human demonstrations."""

import math

import numpy as np
import pytest
import torch

from flowsteer.sim.rollout_pool import RolloutPool
from flowsteer.sim.tasks.mujoco_task import State
from flowsteer.sim.tasks.pusht import PushT
from flowsteer.sim.tasks.pusht_mj import MASS_CENTRE, PIXELS, PushTMujoco

mujoco = pytest.importorskip("mujoco")
TASK = PushTMujoco()


def states(*rows):
    """Finger x, y, block x, y, angle in pixels and radians -> qpos [n, 5]."""
    rows = np.array(rows)
    angle = rows[:, 4]
    centre = rows[:, 2:4] + MASS_CENTRE * np.stack([-np.sin(angle), np.cos(angle)], axis=1)
    return np.concatenate([rows[:, :2] / PIXELS, centre / PIXELS, rows[:, 4:]], axis=1)


def state(qpos):
    return State(qpos, 0 * qpos, qpos[..., :0])


def test_observation_and_judgement_by_hand():
    qpos = states((50, 60, 200, 300, math.pi / 2), (10, 20, 256, 256, math.pi / 4))
    seen = TASK.observe(np, state(qpos))
    np.testing.assert_allclose(seen["agent_position"], [[50, 60], [10, 20]])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(seen["block_pose"], [[200, 300, 0, 1], [256, 256, half, half]], atol=1e-12)
    judged = TASK.judge(np, state(qpos), np.zeros((2, 2)), state(qpos))
    assert judged.reward[1] == 1
    assert judged.terminated.tolist() == judged.success.tolist() == [False, True]


def test_numpy_and_torch_agree():
    qpos = states(*np.random.default_rng(0).uniform((0, 0, 150, 150, -4), (512, 512, 350, 350, 4), (50, 5)))
    theirs = torch.from_numpy(qpos)
    actions = np.random.default_rng(1).uniform(0, 512, (50, 2))
    np.testing.assert_array_equal(TASK.control(np, actions), TASK.control(torch, torch.from_numpy(actions)).numpy())
    for key, value in TASK.observe(np, state(qpos)).items():
        np.testing.assert_allclose(value, TASK.observe(torch, state(theirs))[key].numpy(), atol=1e-9)
    ours = TASK.judge(np, state(qpos), actions, state(qpos))
    for value, other in zip(
        ours, TASK.judge(torch, state(theirs), torch.from_numpy(actions), state(theirs)), strict=True
    ):
        np.testing.assert_allclose(value, other.numpy(), atol=1e-9)
    draws = TASK.draws(range(9))
    for value, other in zip(TASK.initial(np, draws), TASK.initial(torch, torch.from_numpy(draws)), strict=True):
        np.testing.assert_array_equal(value, other.numpy())


def test_an_episode_starts_where_gym_pusht_starts_it():
    pytest.importorskip("gym_pusht")
    ours, theirs = TASK.make(), PushT().make()
    for seed in range(5):
        mine, other = ours.reset(seed), theirs.reset(seed)
        np.testing.assert_allclose(mine["agent_position"], other["agent_position"])
        np.testing.assert_allclose(mine["block_pose"], other["block_pose"], atol=1e-3)


def test_the_human_demonstrations_replay_in_it(shared_data):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(shared_data / "pusht_human" / "pusht_cchi_v7_replay.zarr", mode="r")
    recorded, actions = group["data/state"][:], group["data/action"][:].astype(np.float32)
    ends = group["meta/episode_ends"][:][::10]
    starts = np.concatenate([[0], group["meta/episode_ends"][:-1]])[::10]
    steps = 100
    long = ends - starts > steps
    starts = starts[long]
    pool = RolloutPool(TASK, len(starts), 1, threads=1)
    pool.start(dict.fromkeys(range(len(starts)), 0))
    pool.states[:, 1:6] = states(*recorded[starts])
    pool.states[:, 6:] = 0
    chunks = {i: actions[start : start + steps] for i, start in enumerate(starts)}
    outcomes, lost = pool.run(chunks)
    assert not lost
    assert (outcomes["env_steps"] == steps).all()
    expected = recorded[starts + steps]
    seen = pool.windows["block_pose"][:, 0]
    missed = np.linalg.norm(seen[:, :2] - expected[:, 2:4], axis=1)
    assert len(starts) > 15
    assert np.median(missed) < 1.5
    assert np.quantile(missed, 0.9) < 5


def test_the_block_stops_with_the_finger_and_stays_on_the_board():
    env = TASK.make()
    env.reset(0)
    qpos = states((256, 100, 256, 200, 0.0))[0]
    env._data.qpos[:], env._data.qvel[:] = qpos, 0
    for _ in range(60):
        step = env.step(np.array([256.0, 600.0]))
    x, y, cos, _ = step.observation["block_pose"]
    assert y + 120 * cos == pytest.approx(504, abs=2), "the stem's end lies at the wall"
    before = np.array([x, y])
    for _ in range(10):
        step = env.step(step.observation["agent_position"].astype(float))
    np.testing.assert_allclose(step.observation["block_pose"][:2], before, atol=0.5)
