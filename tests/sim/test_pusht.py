import math

import numpy as np
import pytest

from flowsteer.sim.errors import SimError
from flowsteer.sim.tasks.pusht import PushT, progress_reward
from flowsteer.sim.tasks.pusht_mj import PushTMujoco
from flowsteer.sim.tasks.pusht_state import BLOCK_KEYPOINTS, BOARD, agent_in_block, near_goal
from flowsteer.sim.tasks.pusht_symmetry import in_hindsight, mirrored

zarr = pytest.importorskip("zarr")
reference = pytest.importorskip("gym_pusht.envs.pusht")


@pytest.fixture(scope="module")
def demonstrations(shared_data):
    group = zarr.open_group(shared_data / "pusht_human" / "pusht_cchi_v7_replay.zarr", mode="r")
    ends = group["meta/episode_ends"][:]
    return group["data"], list(zip([0, *ends[:-1]], ends, strict=True))


def assert_same_state(observation, state):
    """`state` is gym-pusht's: finger x, y, block x, y, angle."""
    x, y, angle = state[2:]
    np.testing.assert_array_equal(observation["agent_position"], state[:2].astype(np.float32))
    np.testing.assert_allclose(observation["block_pose"], [x, y, math.cos(angle), math.sin(angle)], rtol=1e-6)


def test_the_same_numbers_as_gym_pusht():
    ours, theirs, rng = PushT().make(), reference.PushTEnv(), np.random.default_rng(0)
    for seed in range(3):
        expected, _ = theirs.reset(seed=seed)
        assert_same_state(ours.reset(seed), expected)
        for _ in range(150):
            # Aimed at the block, so that it is pushed about.
            action = (np.array(theirs.block.position) + rng.normal(0, 60, 2)).astype(np.float32)
            expected, reward, terminated, _, info = theirs.step(action)
            step = ours.step(action)
            assert_same_state(step.observation, expected)
            assert step.reward == pytest.approx(reward, abs=1e-12)
            assert (step.terminated, step.success) == (terminated, info["is_success"])


def test_on_the_goal_the_episode_ends_with_success():
    env = PushT().make()
    env.set_state(np.array([50.0, 50.0, 256.0, 256.0, math.pi / 4]))
    assert env.coverage() == pytest.approx(1.0)
    step = env.step(np.array([50.0, 50.0]))
    assert (step.reward, step.terminated, step.success) == (1.0, True, True)


def test_the_observation_does_not_jump_where_the_angle_wraps():
    env = PushT().make()
    before, after = (env.set_state(np.array([50, 50, 200, 300, angle]))["block_pose"] for angle in (-1e-3, 1e-3))
    np.testing.assert_allclose(before, [200, 300, 1, -1e-3], atol=1e-4)
    np.testing.assert_allclose(after, [200, 300, 1, 1e-3], atol=1e-4)


def test_coverage_by_hand():
    # Moved by 30 along the bar's direction, the stem (30 wide) leaves its place and the bar (120 long) keeps 90:
    # of the area 120 * 30 + 30 * 90 = 6300 only 90 * 30 = 2700 stays covered.
    env = PushT().make()
    shift = 30 / math.sqrt(2)
    env.set_state(np.array([50.0, 50.0, 256.0 + shift, 256.0 + shift, math.pi / 4]))
    assert env.coverage() == pytest.approx(2700 / 6300, abs=1e-6)
    assert env.step(np.array([50.0, 50.0])).reward == pytest.approx(2700 / 6300 / 0.95, abs=1e-6)


def test_keypoints_turn_and_move_with_the_block():
    env = PushT("keypoints").make()
    observation = env.set_state(np.array([50.0, 60.0, 200.0, 300.0, math.pi / 2]))
    # A quarter turn takes (x, y) to (-y, x).
    expected = np.stack([200 - BLOCK_KEYPOINTS[:, 1], 300 + BLOCK_KEYPOINTS[:, 0]], axis=-1)
    np.testing.assert_allclose(observation["keypoint"], expected, atol=1e-4)
    np.testing.assert_allclose(observation["agent_position"], [50, 60])


def test_recorded_states_give_the_recorded_observations(demonstrations):
    data, episodes = demonstrations
    keypoints, image = PushT("keypoints").make(), PushT("image").make()
    for _, end in episodes[::20]:
        frame = end - 20
        observation = keypoints.set_state(data["state"][frame])
        np.testing.assert_allclose(observation["keypoint"], data["keypoint"][frame], atol=0.06)
        np.testing.assert_allclose(observation["agent_position"], data["state"][frame][:2], atol=1e-4)
        difference = np.abs(image.set_state(data["state"][frame])["image"] - data["img"][frame])
        assert (difference > 8).mean() < 0.005, "more than the finger's outline differs"


def test_recorded_actions_replay_to_the_recorded_states(demonstrations):
    data, episodes = demonstrations
    env = PushT().make()
    for begin, end in episodes[::25]:
        states, actions = data["state"][begin:end], data["action"][begin:end]
        env.set_state(states[0])
        for action, state in zip(actions[:-1], states[1:], strict=True):
            observation = env.step(action).observation
            np.testing.assert_allclose(observation["agent_position"], state[:2], atol=0.2)
            np.testing.assert_allclose(observation["block_pose"][:2], state[2:4], atol=0.2)
            np.testing.assert_allclose(observation["block_pose"][2:], [np.cos(state[4]), np.sin(state[4])], atol=2e-3)


def test_dataset_keys_lead_to_the_recorded_arrays(demonstrations):
    data, _ = demonstrations
    for choice in ("state", "keypoints", "image"):
        task = PushT(choice)
        for name, array in task.spec.observations.items():
            source = task.dataset_keys.get(name)
            recorded = data[name if source is None else source.key][:1]
            observed = recorded if source is None or source.read is None else source.read(recorded)
            assert observed.shape[1:] == array.shape


def test_the_recorded_block_pose_is_read_as_it_is_observed():
    state = np.array([[10.0, 20.0, 30.0, 40.0, math.pi / 6]])
    keys = PushT().dataset_keys
    np.testing.assert_array_equal(keys["agent_position"].read(state), [[10, 20]])
    np.testing.assert_allclose(keys["block_pose"].read(state), [[30, 40, math.sqrt(3) / 2, 0.5]], rtol=1e-6)


def test_features_by_hand():
    # The block's frame is turned by a quarter: what is 10 to the right of the block is at (0, -10) in it.
    state = np.array([110.0, 200.0, 100.0, 200.0, math.pi / 2])
    np.testing.assert_allclose(agent_in_block(state), [0.0, -10.0], atol=1e-5)
    there = np.array([0.0, 0.0, 256.0, 256.0, math.pi / 4])
    np.testing.assert_allclose(near_goal(there), [0.0, 0.0, 0.0], atol=1e-6)
    # 30 pixels to the right of it, and a whole turn and 0.3 rad further.
    off = there + np.array([0, 0, 30, 0, 2 * math.pi + 0.3])
    np.testing.assert_allclose(near_goal(off), [math.tanh(1), 0.0, math.tanh(1)], atol=1e-6)


def test_recorded_features_are_those_that_the_environment_shows():
    task = PushT("features")
    state = np.array([[50.0, 400.0, 200.0, 300.0, -2.5]])
    seen = task.make().set_state(state[0])
    for key in ("agent_in_block", "near_goal"):
        np.testing.assert_allclose(seen[key], task.dataset_keys[key].read(state)[0], atol=1e-3)


def test_the_progress_reward_by_hand():
    # Coverage / 0.95 from 0.5 to 0.75; beyond 0.95 of the goal there is nothing more to gain, but the 1 for solving it.
    assert progress_reward(lambda: 0.475, 0.7125) == pytest.approx(0.25)
    assert progress_reward(lambda: 0.475, 0.98) == pytest.approx(0.5 + 1.0)
    assert progress_reward(lambda: 0.7125, 0.475) == pytest.approx(-0.25)


def test_progress_adds_up_to_what_has_been_covered():
    env = PushT(reward="progress").make()
    shift = 30 / math.sqrt(2)
    env.set_state(np.array([50.0, 400.0, 256.0 + shift, 256.0 + shift, math.pi / 4]))
    start, total = env.coverage(), 0.0
    for _ in range(15):
        total += env.step(np.array([300.0, 330.0])).reward
    assert env.coverage() != pytest.approx(start, abs=0.02)
    assert total == pytest.approx((env.coverage() - start) / 0.95)


def test_learning_has_another_reward_than_evaluation():
    assert PushT().reward == "coverage"
    assert PushT(**PushT.training_options).reward == "progress"
    with pytest.raises(SimError, match=r"pusht: reward 'progres' is unknown, choose one of \['coverage', 'progress'\]"):
        PushT(reward="progres")


def test_the_mirror_image_by_hand():
    # Over the line x + y = 512: a finger at the top left comes to the bottom right, a T on the goal stays there.
    image = np.zeros((1, 96, 96, 3), np.uint8)
    image[0, 10, 20, 0] = 7
    arrays = {
        "agent_position": np.array([[10.0, 20.0]]),
        "block_pose": np.array([[256.0, 256.0, math.cos(0.3), math.sin(0.3)]]),
        "image": image,
        "action": np.array([[512.0, 100.0]]),
    }
    result = mirrored(arrays)
    np.testing.assert_array_equal(result["agent_position"], [[492.0, 502.0]])
    np.testing.assert_array_equal(result["action"], [[412.0, 0.0]])
    np.testing.assert_allclose(result["block_pose"], [[256, 256, math.cos(math.pi / 2 - 0.3), math.cos(0.3)]])
    assert result["image"][0, 75, 85, 0] == 7
    assert result["image"].sum() == 7


def test_mirroring_twice_changes_nothing():
    rng = np.random.default_rng(0)
    arrays = {
        "agent_position": rng.uniform(0, 512, (5, 2)),
        "block_pose": rng.normal(size=(5, 4)),
        "image": rng.integers(0, 255, (5, 96, 96, 3), np.uint8),
        "action": rng.uniform(0, 512, (5, 2)),
    }
    for key, value in mirrored(mirrored(arrays)).items():
        np.testing.assert_allclose(value, arrays[key], atol=1e-12)


def test_the_world_behaves_the_same_in_the_mirror():
    # Straight pushes of 1 s; long ones diverge, as contact is chaotic and the mirrored numbers round differently.
    env, twin, rng = PushT("features").make(), PushT("features").make(), np.random.default_rng(1)
    moved = 0
    for _ in range(10):
        x, y, angle = rng.uniform(150, 350), rng.uniform(150, 350), rng.uniform(-3, 3)
        away = rng.normal(size=2)
        finger = np.array([x, y]) + 140 * away / np.linalg.norm(away)
        env.set_state(np.array([*finger, x, y, angle]))
        twin.set_state(np.array([*(BOARD - finger[::-1]), BOARD - y, BOARD - x, math.pi / 2 - angle]))
        for k in range(10):
            action = finger + (k + 1) / 7 * (np.array([x, y]) - finger)
            seen = env.step(action)
            expected = mirrored({key: value[None] for key, value in {**seen.observation, "action": action}.items()})
            step = twin.step(expected.pop("action")[0])
            for key, value in expected.items():
                np.testing.assert_allclose(step.observation[key], value[0], atol=0.01)
            assert step.reward == pytest.approx(seen.reward, abs=1e-3)
        moved += math.dist(env.block_pose()[:2], (x, y)) > 5
    assert moved >= 5


def test_only_observations_that_have_a_mirror_image_have_one():
    assert all(task.mirror is mirrored for task in (PushT(), PushT("features"), PushT("image"), PushTMujoco()))
    assert PushT("keypoints").mirror is None


def test_hindsight_by_hand():
    # Two episodes. The second ends with the block at (200, 300), turned by a quarter too much: turning it back takes
    # what lies 10 to its right to 10 above it (y points down), and (200, 300) comes to (256, 256).
    quarter = math.pi / 4
    pose = [
        [100, 100, 1, 0],
        [256, 256, math.cos(quarter), math.sin(quarter)],
        [200, 300, math.cos(3 * quarter), math.sin(3 * quarter)],
    ]
    arrays = {
        "agent_position": np.array([[50.0, 60.0], [70.0, 80.0], [210.0, 300.0]]),
        "block_pose": np.array(pose),
        "action": np.array([[1.0, 2.0], [3.0, 4.0], [200.0, 310.0]]),
        "near_goal": np.ones((3, 3)),
    }
    result = in_hindsight(arrays, np.array([2, 3]))
    np.testing.assert_allclose(result["agent_position"], [[50, 60], [70, 80], [256, 246]], atol=1e-4)
    np.testing.assert_allclose(result["action"], [[1, 2], [3, 4], [266, 256]], atol=1e-4)
    on_goal = [256, 256, math.cos(quarter), math.sin(quarter)]
    np.testing.assert_allclose(result["block_pose"], [[100, 100, 1, 0], on_goal, on_goal], atol=1e-4)
    np.testing.assert_allclose(result["near_goal"][1:], np.zeros((2, 3)), atol=1e-6)
    assert set(result) == set(arrays)


def test_in_hindsight_the_finger_is_where_it_was_beside_the_block():
    rng = np.random.default_rng(0)
    state = np.concatenate([rng.uniform(0, 512, (20, 4)), rng.uniform(-9, 9, (20, 1))], axis=-1)
    arrays = {key: stored.read(state) for key, stored in PushT("features").dataset_keys.items() if stored.read}
    result = in_hindsight({**arrays, "action": state[:, :2]}, np.array([5, 6, 20]))
    np.testing.assert_allclose(result["agent_in_block"], arrays["agent_in_block"], atol=1e-3)
    np.testing.assert_allclose(result["action"], result["agent_position"], atol=1e-3)


def test_only_what_shows_the_block_can_be_seen_in_hindsight():
    assert all(task.hindsight is in_hindsight for task in (PushT(), PushT("features"), PushTMujoco()))
    assert PushT("keypoints").hindsight is None
    assert PushT("image").hindsight is None


def test_human_demonstrations_stop_short_of_success_and_reach_it_in_hindsight(demonstrations):
    data, episodes = demonstrations
    ends = np.array([end for _, end in episodes])
    arrays = {key: stored.read(data["state"][:]) for key, stored in PushT().dataset_keys.items() if stored.read}
    arrays["action"] = data["action"][:]
    moved = in_hindsight(arrays, ends)
    env = PushT().make()

    def last_coverages(arrays):
        for agent, (x, y, cos, sin) in zip(
            arrays["agent_position"][ends - 1], arrays["block_pose"][ends - 1], strict=True
        ):
            env.set_state(np.array([*agent, x, y, math.atan2(sin, cos)]))
            yield env.coverage()

    assert max(last_coverages(arrays)) < 0.91
    assert min(last_coverages(moved)) > 0.99
