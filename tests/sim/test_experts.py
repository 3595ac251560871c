import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from flowsteer.sim.experts import EXPERTS, ArmLiftExpert, CanExpert, Fingers, LiftExpert, above, move, upright_error
from flowsteer.sim.tasks.arm_lift import ArmLift
from flowsteer.sim.tasks.robosuite import Can, Lift

pytest.importorskip("robosuite")


def test_the_funnel_is_high_aside_and_ends_at_the_target():
    target = np.array([0.1, 0.2, 0.8])
    # 30 mm aside: 4 * (0.03 - 0.008) = 0.088 m above.
    np.testing.assert_allclose(above(target, np.array([0.13, 0.2, 0.5])), [0.1, 0.2, 0.888])
    np.testing.assert_allclose(above(target, np.array([0.1, 0.207, 0.5])), target)
    np.testing.assert_allclose(above(target, np.array([0.5, 0.2, 0.5])), [0.1, 0.2, 0.9])


@given(st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=3))
def test_the_turn_to_upright_is_the_rotation_vector_of_the_error(vector):
    down = Rotation.from_quat([1.0, 0, 0, 0])
    hand = Rotation.from_rotvec(vector).inv() * down
    for sign in (1, -1):  # both quaternions are the same hand
        np.testing.assert_allclose(upright_error(sign * hand.as_quat(canonical=True)), vector, atol=1e-3)


@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
)
def test_moves_are_within_the_limits_and_straight(tip, goal):
    observation = {"robot0_eef_pos": np.array(tip), "robot0_eef_quat": np.array([1.0, 0.0, 0.0, 0.0])}
    action = move(observation, np.array(goal), -1.0)
    assert np.linalg.norm(action[:3]) <= 1 + 1e-9
    assert np.abs(action).max() <= 1 + 1e-9
    np.testing.assert_allclose(np.cross(action[:3], np.subtract(goal, tip)), 0, atol=1e-9)
    assert np.dot(action[:3], np.subtract(goal, tip)) >= 0


def test_fingers_hold_when_they_stop_closing_on_something():
    fingers = Fingers(near=0.02, widest=0.07)
    fingers.reset()
    at = 0.01
    widths = [0.078, 0.075, 0.068, 0.061, 0.0600, 0.0599]
    held = [fingers.update(at, np.array([w / 2, -w / 2]))[1] for w in widths]
    assert held == [False, False, False, False, False, True]
    assert fingers.update(0.03, np.array([0.03, -0.03])) == (False, False)


@pytest.fixture(scope="module")
def envs():
    made = {Lift: Lift().make(), Can: Can().make()}
    yield made
    for env in made.values():
        env.close()


@pytest.mark.parametrize(
    ("task", "expert", "steps", "seeds"), [(Lift, LiftExpert(), 40, range(5)), (Can, CanExpert(), 150, range(3))]
)
def test_experts_succeed_smoothly(envs, task, expert, steps, seeds):
    for seed in seeds:
        observation = envs[task].reset(seed)
        expert.reset()
        actions = []
        for _ in range(steps):
            actions.append(expert.act(observation))
            step = envs[task].step(actions[-1])
            observation = step.observation
            if step.terminated:
                break
        assert step.success, f"seed {seed}"
        moves = np.array(actions)
        assert np.abs(moves).max() <= 1 + 1e-9
        changes = np.linalg.norm(np.diff(moves[:, :3], axis=0), axis=1)
        assert (changes > 0.5).sum() <= 8  # when it comes over the target, closes, lifts and lets go


def test_every_expert_is_for_a_task():
    experts = {Lift: LiftExpert, Can: CanExpert, ArmLift: ArmLiftExpert}
    assert {task().spec.name: expert for task, expert in experts.items()} == EXPERTS
