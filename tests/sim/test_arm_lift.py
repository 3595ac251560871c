"""The arm that lifts a cube: what its targets do, what counts as lifted, and its expert."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from flowsteer.sim import experts
from flowsteer.sim.backends import gym, threads
from flowsteer.sim.collect import ActionNoise, collect
from flowsteer.sim.errors import SimError
from flowsteer.sim.experts import EXPERTS, ArmKinematics, ArmLiftExpert, down, nearest_side_rad, turn_between
from flowsteer.sim.tasks import arm_lift
from flowsteer.sim.tasks.arm_lift import CUBE_HALF, HOME, JOINT_HIGH, JOINT_LOW, REGION, ArmLift
from flowsteer.sim.tasks.mujoco_task import State

pytest.importorskip("robosuite")
mujoco = pytest.importorskip("mujoco")
TASK = ArmLift()


@pytest.fixture(scope="module")
def env():
    made = TASK.make()
    yield made
    made.close()


def states(shape):
    """States [*shape] of any numbers."""
    rng = np.random.default_rng(0)
    return State(*(rng.standard_normal((*shape, width)) for width in (16, 15, 7)))


def test_the_model_is_the_arm_a_gripper_and_a_cube():
    model = TASK.model()
    assert (model.nq, model.nv, model.nu, model.nsensordata) == (16, 15, 9, 7)
    ranges = np.array([model.joint(f"joint{i}").range for i in range(1, 8)])
    np.testing.assert_allclose(ranges.T, [JOINT_LOW, JOINT_HIGH])
    touching = {model.geom(i).name for i in range(model.ngeom) if model.geom_contype[i] | model.geom_conaffinity[i]}
    assert touching == {"finger1_pad_collision", "finger2_pad_collision", "table", "cube"}


@pytest.mark.parametrize("shape", [(3,), (3, 5)])
def test_functions_are_batched_and_the_same_in_torch(shape):
    before, after = states(shape), states(shape)
    actions = np.random.default_rng(1).uniform(TASK.spec.action_low, TASK.spec.action_high, (*shape, 8))

    def everything(xp, make):
        one, other, done = State(*map(make, before)), State(*map(make, after)), make(actions)
        return {
            **TASK.observe(xp, other),
            "control": TASK.control(xp, done),
            **TASK.judge(xp, one, done, other)._asdict(),
        }

    ours, theirs = everything(np, np.asarray), everything(torch, torch.as_tensor)
    for key, value in ours.items():
        assert value.shape[: len(shape)] == shape
        np.testing.assert_allclose(value, theirs[key].numpy(), rtol=1e-12)
    assert ours["success"].any()
    assert not ours["success"].all()
    for key, array in TASK.spec.observations.items():
        assert ours[key].shape == (*shape, *array.shape)


def test_starts_are_the_same_in_torch_and_spread_over_the_region():
    draws = TASK.draws(range(300))
    (qpos, qvel), theirs = TASK.initial(np, draws), TASK.initial(torch, torch.as_tensor(draws))
    np.testing.assert_allclose(qpos, theirs[0].numpy(), rtol=1e-12)
    assert qvel.shape == theirs[1].shape == (300, 15)
    assert not qvel.any()
    cube, yaw = qpos[:, 9:11], Rotation.from_quat(qpos[:, 12:], scalar_first=True).as_euler("xyz")[:, 2]
    np.testing.assert_allclose([cube.min(0), cube.max(0)], REGION, atol=0.01)
    np.testing.assert_allclose([yaw.min(), yaw.max()], [-np.pi / 4, np.pi / 4], atol=0.02)
    np.testing.assert_allclose(qpos[:, 11], CUBE_HALF)
    np.testing.assert_allclose(qpos[:, :7] - HOME, 0, atol=0.02)


def test_the_gripper_opens_and_closes_in_proportion():
    actions = np.zeros((3, 8))
    actions[:, 7] = [-1, 0, 1]
    np.testing.assert_allclose(TASK.control(np, actions)[:, 7:], [[0.04, -0.04], [0.02, -0.02], [0, 0]], atol=1e-12)


def test_lifted_is_4_cm_above_where_it_lies():
    heights = np.array([0.02, 0.0599, 0.0601])
    qpos = np.zeros((3, 16))
    qpos[:, 11] = heights
    state = State(qpos, np.zeros((3, 15)), np.zeros((3, 7)))
    judged = TASK.judge(np, state, np.zeros((3, 8)), state)
    assert judged.terminated.tolist() == judged.success.tolist() == [False, False, True]
    assert judged.reward.tolist() == [0.0, 0.0, 1.0]


def test_quaternions_keep_their_sign():
    state = states((50,))
    flipped = State(state.qpos.copy(), state.qvel, state.sensors.copy())
    flipped.qpos[:, 12:16] *= -1
    flipped.sensors[:, 3:7] *= -1
    one, other = TASK.observe(np, state), TASK.observe(np, flipped)
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert (one["object"][:, 6] >= 0).all()
    assert (one["robot0_eef_quat"][:, 0] >= 0).all()


def test_home_points_down_over_the_middle_of_the_region(env):
    env.reset(0)
    for _ in range(20):
        seen = env.step(np.array([*HOME, -1.0])).observation
    np.testing.assert_allclose(seen["robot0_eef_pos"], [*np.mean(REGION, axis=0), 0.2], atol=2e-3)
    np.testing.assert_allclose(seen["robot0_eef_quat"], [1, 0, 0, 0], atol=2e-3)
    np.testing.assert_allclose(seen["object"][7:], seen["object"][:3] - seen["robot0_eef_pos"], atol=1e-6)


def test_joint_targets_are_reached_within_half_a_second(env):
    rng = np.random.default_rng(0)
    for seed in range(5):
        env.reset(seed)
        target = np.array([*HOME, -1.0])
        target[:7] += rng.uniform(-0.3, 0.3, 7)
        target[1] = HOME[1] - abs(target[1] - HOME[1])  # away from the table
        for _ in range(12):
            seen = env.step(target).observation
        np.testing.assert_allclose(seen["robot0_joint_pos"], target[:7], atol=0.01)


def test_a_joint_goes_to_its_target_without_overshoot(env):
    for joint in range(7):
        env.reset(0)
        target = np.array([*HOME, -1.0])
        for _ in range(10):
            env.step(target)
        target[joint] += 0.2
        way = [(env.step(target).observation["robot0_joint_pos"][joint] - HOME[joint]) / 0.2 for _ in range(10)]
        assert way[0] > 0.2, "too slow to follow actions at 20 Hz"
        assert max(way) < 1.03


def test_fingertips_stop_at_the_table_and_the_cube_stays_where_it_lies(env):
    first = env.reset(0)
    target = np.array([*HOME, -1.0])
    target[1] += 0.5
    for _ in range(20):
        seen = env.step(target).observation
    # The site is 10.9 mm above the ends of the fingers when they point down.
    assert -0.005 < seen["robot0_eef_pos"][2] < 0.03
    env.reset(0)
    for _ in range(20):
        seen = env.step(np.array([*HOME, -1.0])).observation
    np.testing.assert_allclose(seen["object"][:7], first["object"][:7], atol=1e-3)


def expert_actions(env, seed):
    """Everything that the expert does until the end, and the last step."""
    expert, seen, actions = ArmLiftExpert(), env.reset(seed), []
    expert.reset()
    for _ in range(60):
        actions.append(expert.act(seen))
        step = env.step(actions[-1])
        seen = step.observation
        if step.terminated:
            break
    return np.array(actions), step


def test_the_expert_lifts_smoothly_within_the_limits(env):
    for seed in range(10):
        actions, step = expert_actions(env, seed)
        assert step.success, f"seed {seed}"
        assert step.reward == 1.0
        assert step.observation["object"][2] > 0.06
        assert len(actions) <= 25
        assert (actions >= TASK.spec.action_low).all()
        assert (actions <= TASK.spec.action_high).all()
        assert np.abs(np.diff(actions[:, :7], axis=0)).max() < 0.35


def test_the_expert_corrects_what_noise_does():
    noise = ActionNoise(std=0.02, correlation=0.5)
    kept = collect(TASK, EXPERTS["arm_lift"], episodes=5, seed=0, noise=noise, only_successful=False)
    assert kept.meta["episodes"]["success"] == [True] * 5
    assert kept.data["action"].shape == (kept.episode_ends[-1], 8)
    assert kept.data["reward"].sum() == 5


def test_episodes_repeat_from_their_seed(env):
    first, second, other = (expert_actions(env, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], other[0])


def test_threads_lift_as_single_worlds_do(env):
    wanted = {seed: expert_actions(env, seed)[0] for seed in range(3)}
    steps = max(map(len, wanted.values())) // 4 * 4 + 4
    actions = np.stack([np.concatenate([a, np.repeat(a[-1:], steps - len(a), axis=0)]) for a in wanted.values()])
    chunks = torch.from_numpy(actions.astype(np.float32)).split(4, dim=1)
    ended = torch.zeros(3, dtype=torch.bool)
    with threads(TASK, 3, 2, workers=2) as together, gym(TASK, 3, 2) as alone:
        one, other = together.reset(range(3)), alone.reset(range(3))
        for chunk in chunks:
            for key, value in one.items():
                torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-5)
            a, b = together.step_chunk(chunk), alone.step_chunk(chunk)
            one, other = a.final_obs, b.final_obs
            assert torch.equal(a.reward_sum, b.reward_sum)
            assert torch.equal(a.terminated, b.terminated)
            assert torch.equal(a.info["env_steps"], b.info["env_steps"])
            ended |= a.terminated
    assert ended.all()


@given(st.floats(-0.78, 0.78), st.integers(0, 23))
def test_the_nearest_side_is_found_whichever_is_the_top(yaw, face):
    turned = Rotation.from_euler("z", yaw) * Rotation.create_group("O")[face]
    assert nearest_side_rad(turned.as_quat()) == pytest.approx(yaw, abs=1e-9)


@given(st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3), st.floats(-3, 3))
def test_the_turn_is_the_rotation_vector(vector, yaw):
    old = down(yaw)
    np.testing.assert_allclose(turn_between(old, Rotation.from_rotvec(vector).as_matrix() @ old), vector, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.02, 0.02), min_size=3, max_size=3), st.floats(-0.1, 0.1))
def test_the_arm_is_moved_as_asked(displacement, yaw):
    arm, home = ArmKinematics(), np.array(HOME)
    data = mujoco.MjData(experts._arm_model())
    joints = arm.toward(home, np.array(displacement), yaw)
    tips = []
    for q in (home, joints):
        data.qpos[:7] = q
        mujoco.mj_kinematics(experts._arm_model(), data)
        tips.append(data.site("grip_site").xpos.copy())
    np.testing.assert_allclose(tips[1] - tips[0], displacement, atol=2e-3)
    np.testing.assert_allclose(data.body("right_hand").xmat.reshape(3, 3), down(yaw), atol=0.02)


def test_a_missing_robosuite_is_one_line_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(SimError, match=r"^this needs the package of 'robosuite': pip install '.*\[robosuite\]'$"):
        TASK.model()


def test_another_robosuite_is_one_line_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(arm_lift, "robosuite_assets", lambda: str(tmp_path))
    with pytest.raises(SimError, match=r"^arm_lift: robosuite's Panda does not load \(.*\): pip install '.*'$"):
        TASK.model()


def test_the_model_is_found_without_importing_robosuite():
    code = "import sys; from flowsteer.sim.tasks.arm_lift import ArmLift; ArmLift().model(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "mujoco" in loaded
    assert "robosuite" not in loaded
