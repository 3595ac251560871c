import json

import h5py
import numpy as np
import pytest
from counting import Counting
from counting_experts import CountUp, DiesInEpisode5

from flowsteer.sim.collect import ActionNoise, collect, record
from flowsteer.sim.errors import SimError
from flowsteer.sim.experts import ArmLiftExpert, Expert, LiftExpert
from flowsteer.sim.tasks.arm_lift import HOME, ArmLift
from flowsteer.sim.tasks.robosuite import Can, Lift, task_from_env_args
from flowsteer.sim.tasks.robosuite_states import observations_from_states

NOISE = ActionNoise(std=0.2, correlation=0.5, pause_probability=0.05)


def test_what_was_seen_is_beside_what_was_done_next():
    collected = collect(Counting(limit=3), CountUp, episodes=2, seed=4, only_successful=False)
    assert collected.episode_ends.tolist() == [3, 6]
    # Columns: seed, step, last action.
    assert collected.data["count"].tolist() == [[4, 0, 0], [4, 1, 0], [4, 2, 1], [5, 0, 0], [5, 1, 0], [5, 2, 501]]
    assert collected.data["action"].tolist() == [[0], [1], [2], [0], [501], [2]]
    assert collected.data["reward"].tolist() == [0, 1, 2, 0, 501, 2]
    assert collected.data["picture"].dtype == np.uint8
    assert collected.meta == {
        "task": "counting",
        "control_hz": 10.0,
        "episodes": {"seed": [4, 5], "success": [False, True]},
    }


def test_failed_episodes_give_their_place_to_the_next_seeds():
    told = []
    collected = collect(
        Counting(limit=3), CountUp, episodes=3, seed=0, progress=lambda kept, tried: told.append((kept, tried))
    )
    assert collected.meta["episodes"]["seed"] == [1, 3, 5]
    assert told == [(0, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 6)]


def test_an_episode_ends_by_the_tasks_rule():
    collected = collect(Counting(lengths={1: 2}, limit=9), CountUp, episodes=1, seed=1)
    assert collected.episode_ends.tolist() == [2]


def test_an_expert_that_fails_is_told_so():
    with pytest.raises(SimError, match=r"only 0 of 24 episodes succeeded \(seeds 0 to 23\); lower the noise"):
        collect(Counting(limit=1), CountUp, episodes=1, seed=0)


def test_a_dead_worker_is_named():
    with pytest.raises(SimError, match="worker 1 of 2 died in the episode of seed 5"):
        collect(Counting(limit=3), DiesInEpisode5, episodes=4, seed=0, num_workers=2)


def test_a_worker_that_cannot_begin_says_why():
    class Broken(Counting):
        def make(self):
            raise SimError("this needs the package of 'nothing'")

    with pytest.raises(SimError, match="package of 'nothing'"):
        collect(Broken(), CountUp, episodes=1, seed=0)


def test_noise_must_make_sense():
    with pytest.raises(SimError, match=r"correlation and pause_probability in \[0, 1\)"):
        ActionNoise(std=0.1, correlation=1.0)
    with pytest.raises(SimError, match="std must be positive or 0"):
        ActionNoise(std=float("nan"))
    with pytest.raises(SimError, match="pause_steps must be at least 1, got 0"):
        ActionNoise(pause_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0, "seed": 0}, "episodes must be at least 1, got 0"),
        ({"episodes": 1, "seed": -1}, "seed must not be"),
    ],
)
def test_nothing_to_collect_is_refused_before_anything_runs(options, message):
    told = []
    with pytest.raises(SimError, match=message):
        collect(Counting(), CountUp, **options, progress=lambda kept, tried: told.append(tried))
    assert told == []


def test_nothing_to_record_is_refused():
    with pytest.raises(SimError, match="counting: every episode to record needs at least one action"):
        record(Counting(), {3: np.zeros((0, 1))})


class Still(Expert):
    def reset(self):
        pass

    def act(self, observation):
        return np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0])


def test_noise_has_its_spread_its_correlation_and_spares_the_gripper():
    pytest.importorskip("robosuite")
    noise = ActionNoise(std=0.1, correlation=0.8)
    collected = collect(Lift(), Still, episodes=1, seed=0, noise=noise, record_clean=False, only_successful=False)
    offsets = collected.data["action"][:, :6] - 0.5
    assert (collected.data["action"][:, 6] == 1.0).all()
    assert offsets.shape == (400, 6)
    assert offsets.std() == pytest.approx(0.1, rel=0.15)
    neighbours = np.mean(offsets[1:] * offsets[:-1]) / np.mean(offsets**2)
    assert neighbours == pytest.approx(0.8, abs=0.1)


def test_pauses_stand_still_for_their_length():
    pytest.importorskip("robosuite")
    noise = ActionNoise(pause_probability=0.1, pause_steps=3)
    collected = collect(Lift(), Still, episodes=1, seed=1, noise=noise, record_clean=False, only_successful=False)
    paused = (collected.data["action"][:, :6] == 0).all(axis=1)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], paused, [0]]))))[::2]
    assert paused.mean() == pytest.approx(0.25, abs=0.1)
    assert (runs[:-1] % 3 == 0).all()


class Rising(Expert):
    """Wants another joint target in every step, and the gripper to open and close in turns."""

    def reset(self):
        self.step = 0

    def act(self, observation):
        self.step += 1
        return np.array([*(np.array(HOME) + 0.01 * self.step), (-1.0) ** self.step])


def paused_rise(pause_probability, record_clean):
    pytest.importorskip("robosuite")
    noise = ActionNoise(pause_probability=pause_probability, pause_steps=3)
    options = {"episodes": 1, "seed": 0, "only_successful": False}
    return collect(ArmLift(), Rising, noise=noise, record_clean=record_clean, **options).data["action"]


def test_a_pause_between_targets_holds_the_last_one():
    done, wanted = paused_rise(0.2, record_clean=False), paused_rise(0.2, record_clean=True)
    paused = (np.diff(done[:, :7], axis=0) == 0).all(axis=1)
    assert paused.mean() == pytest.approx(0.43, abs=0.15)  # 3 of 1 / 0.2 + 3 - 1
    np.testing.assert_array_equal(done[1:][~paused], wanted[1:][~paused])
    np.testing.assert_array_equal(done[:, 7], wanted[:, 7])


def test_a_pause_before_any_target_holds_the_first_one():
    done = paused_rise(0.99, record_clean=False)
    np.testing.assert_allclose(done[:3, :7], [np.array(HOME) + 0.01] * 3, atol=1e-6)


def test_an_arm_that_pauses_still_lifts():
    pytest.importorskip("robosuite")
    noise = ActionNoise(pause_probability=0.2)
    kept = collect(ArmLift(), ArmLiftExpert, episodes=5, seed=0, noise=noise, only_successful=False)
    assert kept.meta["episodes"]["success"] == [True] * 5


def test_lift_is_the_same_from_any_number_of_workers_and_plays_again():
    pytest.importorskip("robosuite")
    alone = collect(Lift(), LiftExpert, episodes=3, seed=7, noise=NOISE, record_clean=False)
    shared = collect(Lift(), LiftExpert, episodes=3, seed=7, noise=NOISE, record_clean=False, num_workers=2)
    assert json.dumps(alone.meta) == json.dumps(shared.meta)
    assert task_from_env_args(alone.meta["env_args"]).setup == Lift().setup
    starts = [0, *alone.episode_ends[:-1]]
    actions = {
        seed: alone.data["action"][start:end]
        for seed, start, end in zip(alone.meta["episodes"]["seed"], starts, alone.episode_ends, strict=True)
    }
    played = record(Lift(), actions)
    for key, array in alone.data.items():
        np.testing.assert_array_equal(array, shared.data[key], err_msg=key)
        np.testing.assert_array_equal(array, played.data[key], err_msg=key)
    assert played.meta == alone.meta


def test_cloning_data_hold_what_was_wanted():
    pytest.importorskip("robosuite")
    noisy = collect(Lift(), LiftExpert, episodes=1, seed=0, noise=ActionNoise(std=0.2))
    expert = LiftExpert()
    expert.reset()
    for i, action in enumerate(noisy.data["action"]):
        observation = {key: noisy.data[key][i] for key in Lift().spec.observations}
        np.testing.assert_allclose(expert.act(observation), action, atol=1e-6)


def test_states_of_robosuite_14_are_seen_as_they_were(shared_data):
    pytest.importorskip("robosuite")
    with h5py.File(shared_data / "robosuite_human_1.4" / "lift" / "demo.hdf5") as file:
        demo = file["data/demo_1"]
        states, actions = demo["states"][::40], demo["actions"][::40]
        following = demo["states"][1::40]
    before, after = (observations_from_states(Lift(), array) for array in (states, following))
    # In the last state the cube is lifted, between the fingertips.
    np.testing.assert_allclose(before["object"][0, :3], states[0, 10:13], atol=1e-6)
    assert after["object"][-1, 2] > 0.84
    np.testing.assert_allclose(after["object"][-1, 7:], 0, atol=0.02)
    # One recorded action leads from each state to the next, give or take what changed since 1.4.
    env = Lift().make()
    env.reset(0)
    for i in range(len(following)):
        env.set_state(states[i])
        reached = env.step(actions[i]).observation["robot0_eef_pos"]
        np.testing.assert_allclose(reached, after["robot0_eef_pos"][i], atol=3e-3)
    env.close()


def test_states_of_another_world_are_refused():
    pytest.importorskip("robosuite")
    with pytest.raises(SimError, match=r"can: a state has \d+ numbers, got \[32\]"):
        observations_from_states(Can(), np.zeros((2, 32)))
