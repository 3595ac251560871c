import numpy as np
import pytest

from flowsteer.sim.tasks.gymnasium_robotics import KITCHEN_SUBTASKS, AdroitDoor, Kitchen
from flowsteer.sim.tasks.locomotion import HalfCheetah, Hopper

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytest.importorskip("gymnasium_robotics")

DEMONSTRATION = 11
"""One of the 8 of 25 that still succeed in this simulator, a newer one than they were recorded in."""


def test_hopper_is_gymnasiums_hopper():
    ours, theirs = Hopper().make(), gymnasium.make("Hopper-v5")
    expected, _ = theirs.reset(seed=5)
    np.testing.assert_array_equal(ours.reset(5)["state"], expected.astype(np.float32))
    actions = np.random.default_rng(0).uniform(-1, 1, (1000, 3)).astype(np.float32)
    for action in actions:
        expected, reward, terminated, _, _ = theirs.step(action)
        step = ours.step(action)
        np.testing.assert_array_equal(step.observation["state"], expected.astype(np.float32))
        assert step.reward == pytest.approx(reward, abs=1e-12)
        assert (step.terminated, step.success) == (terminated, False)
        if terminated:
            break
    assert terminated


@pytest.mark.parametrize(("task", "env_id"), [(Hopper(), "Hopper-v5"), (HalfCheetah(), "HalfCheetah-v5")])
def test_rates_and_limits_are_gymnasiums(task, env_id):
    env = gymnasium.make(env_id)
    assert task.spec.control_hz == pytest.approx(1 / env.unwrapped.dt)
    assert task.spec.max_episode_steps == env.spec.max_episode_steps


def test_kitchen_counts_each_subtask_once_and_ends_with_the_last():
    env = Kitchen(subtasks=("microwave", "light switch")).make()
    assert 1 / env._env.robot_env.dt == pytest.approx(Kitchen.spec.control_hz)
    env.reset(0)
    idle = np.zeros(9)
    assert env.step(idle).reward == 0
    place(env, "microwave")
    step = env.step(idle)
    assert (step.reward, step.success, step.terminated) == (1, False, False)
    assert env.step(idle).reward == 0
    place(env, "light switch")
    step = env.step(idle)
    assert (step.reward, step.success, step.terminated) == (1, True, True)
    env.reset(0)
    assert not env.step(idle).success


def place(env, subtask):
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

    env._env.data.qpos[OBS_ELEMENT_INDICES[subtask]] = OBS_ELEMENT_GOALS[subtask]
    env._env.data.qvel[:] = 0


def test_our_subtasks_are_the_simulators():
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS

    assert set(KITCHEN_SUBTASKS) == set(OBS_ELEMENT_GOALS)


def test_a_human_demonstration_opens_the_door(shared_data):
    demonstrations = np.load(shared_data / "adroit_door_human" / "door_human.npz")
    env = AdroitDoor().make()
    assert 1 / env._env.dt == pytest.approx(AdroitDoor().spec.control_hz)
    env.reset(0)
    env._env.set_env_state(
        {
            "qpos": demonstrations["init_qpos"][DEMONSTRATION],
            "qvel": demonstrations["init_qvel"][DEMONSTRATION],
            "door_body_pos": demonstrations["init_door_body_pos"][DEMONSTRATION],
        }
    )
    begin, end = [0, *demonstrations["episode_ends"]][DEMONSTRATION : DEMONSTRATION + 2]
    steps = [env.step(action) for action in demonstrations["actions"][begin:end].clip(-1, 1)]
    assert any(step.success for step in steps)
    assert not any(step.success for step in steps[:50])
