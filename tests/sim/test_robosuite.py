import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from graphics import skip_without_graphics

from flowsteer.sim.errors import SimError
from flowsteer.sim.experts import LiftExpert
from flowsteer.sim.tasks.robosuite import ROBOSUITE_TASKS, Can, Lift, Square, task_from_env_args
from flowsteer.sim.tasks.robosuite_setup import OscGains

pytest.importorskip("robosuite")
from flowsteer.sim.tasks.offscreen import project

TASKS = [Lift, Can, Square]


@pytest.fixture(scope="module")
def lift():
    env = Lift().make()
    yield env
    env.close()


@pytest.fixture(scope="module")
def can():
    env = Can(object_layout="1.5").make()
    yield env
    env.close()


def actions(steps, seed=0, turn=0.0, gripper=-1.0):
    rng = np.random.default_rng(seed)
    chunk = rng.uniform(-0.7, 0.7, (steps, 7))
    chunk[:, 3:6] *= turn
    chunk[:, 6] = gripper
    return chunk


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("task", TASKS)
def test_observations_are_as_the_spec_says(task):
    task = task()
    env = task.make()
    observation = env.reset(0)
    assert observation.keys() == task.spec.observations.keys()
    for key, array in task.spec.observations.items():
        assert observation[key].shape == array.shape
        assert observation[key].dtype == array.dtype
        assert np.isfinite(observation[key]).all()
    step = env.step(np.zeros(7))
    assert not step.success
    assert not step.terminated
    assert step.reward == 0.0
    env.close()
    env.close()


def test_a_seed_determines_its_episode(lift):
    first = lift.reset(3)
    steps = [lift.step(action).observation for action in actions(20, turn=1.0)]
    assert not same(first, lift.reset(4))
    lift.step(np.ones(7))
    again = lift.reset(3)
    assert same(first, again)
    assert all(same(o, lift.step(a).observation) for o, a in zip(steps, actions(20, turn=1.0), strict=True))


def test_numpys_global_generator_is_left_alone(lift):
    np.random.seed(0)
    expected = np.random.random(3)
    np.random.seed(0)
    lift.reset(9)
    np.testing.assert_array_equal(np.random.random(3), expected)


def robosuites_own(setup, seed):
    """A hard reset and robosuite's own controller, as every script for robosuite does it."""
    import robosuite

    env = robosuite.make(
        setup.world.env_name,
        robots="Panda",
        controller_configs=setup.gains.to_robosuite(),
        control_freq=20,
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        ignore_done=True,
        hard_reset=True,
    )
    np.random.seed(seed)
    env.reset()
    return env


@pytest.mark.parametrize("seed", [2, 5])
def test_lift_is_robosuites_own(lift, seed):
    env = robosuites_own(Lift().setup, seed)
    lift.reset(seed)
    theirs, ours = env.sim.model._model, lift._model
    for name in ("geom_size", "geom_rbound", "geom_aabb", "bvh_aabb", "body_mass", "body_inertia", "body_invweight0"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-15, err_msg=name)
    np.testing.assert_allclose(ours.dof_invweight0, theirs.dof_invweight0, rtol=1e-9)
    expert, observation, corners_on_table = LiftExpert(), lift.reset(seed), 4
    for _ in range(30):
        action = expert.act(observation)
        action[3:6] = 0  # robosuite rounds turns to float32
        env.step(action)
        observation = lift.step(action).observation
        # A touch multiplies the last bits in which the two controllers differ.
        tolerance = 1e-8 if lift._data.ncon <= corners_on_table else 1e-5
        np.testing.assert_allclose(lift._data.qpos[:9], env.sim.data.qpos[:9], rtol=0, atol=tolerance)
        np.testing.assert_allclose(lift._data.qpos, env.sim.data.qpos, rtol=0, atol=1e-5)
    assert lift._data.ncon > corners_on_table


def test_turning_is_robosuites_own_up_to_its_float32(lift):
    env = robosuites_own(Lift().setup, 1)
    lift.reset(1)
    for action in actions(20, turn=1.0):
        env.step(action)
        lift.step(action)
    np.testing.assert_allclose(lift._data.qpos, env.sim.data.qpos, rtol=0, atol=1e-5)


def test_observations_are_robosuites_own_with_layout_15(can):
    ours = can.reset(2)
    theirs = can._env._get_observations(force_update=True)
    for action in actions(6, turn=1.0):
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[{"object": "object-state"}.get(key, key)], atol=1e-5, err_msg=key)
        ours = can.step(action).observation
        theirs = can._env._get_observations(force_update=True)


def test_layout_14_puts_the_pose_first_and_lift_looks_from_the_cube(lift, can):
    observation = lift.reset(0)
    seen = observation["robot0_eef_pos"] - observation["object"][:3]
    np.testing.assert_allclose(observation["object"][7:], seen, atol=1e-6)
    env = Can().make()
    old, new = env.reset(0)["object"], can.reset(0)["object"]
    np.testing.assert_allclose(old, np.concatenate([new[7:], new[:7]]), atol=1e-6)
    env.close()


@pytest.mark.parametrize("task", TASKS)
def test_env_args_bring_the_task_back(task):
    made = task(images=True, cameras=("agentview",), image_size=96, object_layout="1.5", control_hz=10.0)
    again = task_from_env_args(json.loads(json.dumps(made.env_args())))
    assert type(again) is task
    assert again.setup == made.setup
    assert again.spec == made.spec
    assert next(iter(again.spec.observations)) == "agentview_image"


def test_a_robomimic_data_set_of_robosuite_14_opens_its_own_task():
    env_args = {
        "env_name": "PickPlaceCan",
        "env_version": "1.4.1",
        "type": 1,
        "env_kwargs": {
            "robots": ["Panda"],
            "control_freq": 20,
            "use_camera_obs": False,
            "camera_heights": 84,
            "controller_configs": {"type": "OSC_POSE", "kp": 200, "control_delta": True, "interpolation": None},
        },
    }
    setup = task_from_env_args(env_args).setup
    assert setup.object_layout == "1.4"
    assert setup.gains == OscGains(kp=(200.0,) * 6, frame="world")
    assert task_from_env_args({**env_args, "env_version": "1.5.1"}).setup.object_layout == "1.5"


@pytest.mark.parametrize("told", [{}, {"env_version": ""}, {"env_version": None}, {"env_version": 1.4}])
def test_files_that_do_not_tell_their_version_are_old(told):
    assert task_from_env_args({"env_name": "Lift", **told}).setup.object_layout == "1.4"


def test_the_layout_follows_the_version_as_numbers():
    found = {
        version: task_from_env_args({"env_name": "Lift", "env_version": version}).setup.object_layout
        for version in ("1.2.0", "1.5", "1.5.0rc1", "1.10.0", "2.0.0")
    }
    assert found == {"1.2.0": "1.4", "1.5": "1.5", "1.5.0rc1": "1.5", "1.10.0": "1.5", "2.0.0": "1.5"}


def test_the_raw_human_demonstrations_name_their_task(shared_data):
    with h5py.File(shared_data / "robosuite_human_1.4" / "lift" / "demo.hdf5") as file:
        info = json.loads(file["data"].attrs["env_info"])
    name = info.pop("env_name")
    task = task_from_env_args({"env_name": name, "env_version": "1.4.0", "env_kwargs": info})
    assert isinstance(task, Lift)
    assert task.setup.gains == OscGains(frame="world")


@pytest.mark.parametrize(
    ("env_args", "message"),
    [
        ({"env_name": "Lift", "env_version": "master"}, "env_version 'master' is not a version such as '1.4.1'"),
        ("Lift", "env_args: it and its env_kwargs must be mappings, as robomimic stores them"),
        ({"env_name": "Lift", "env_kwargs": "{}"}, "env_args: it and its env_kwargs must be mappings"),
        ({"env_name": "Door"}, r"env_name 'Door' is unknown, choose one of \['Lift', 'NutAssemblySquare', 'Pick"),
        ({"env_name": "Lift", "env_kwargs": {"robots": ["Sawyer"]}}, r"robots \['Sawyer'\] is not supported"),
        (
            {"env_name": "Lift", "env_kwargs": {"controller_configs": {"type": "JOINT_VELOCITY"}}},
            "controller type='JOINT_VELOCITY' is not supported, only 'OSC_POSE'",
        ),
        (
            {"env_name": "Lift", "env_kwargs": {"controller_configs": {"type": "OSC_POSE", "control_delta": False}}},
            "controller input_type='absolute' is not supported, only 'delta'",
        ),
        (
            {"env_name": "Lift", "env_kwargs": {"controller_configs": {"type": "BASIC", "body_parts": {"left": {}}}}},
            r"no body part 'right', only \['left'\]",
        ),
        (
            {"env_name": "Lift", "env_kwargs": {"use_camera_obs": True, "camera_heights": 84, "camera_widths": 96}},
            r"square and of one size, got \[84, 96\]",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(env_args, message):
    with pytest.raises(SimError, match=message) as caught:
        task_from_env_args(env_args)
    assert "\n" not in str(caught.value)


def test_an_unknown_layout_is_refused():
    with pytest.raises(SimError, match=r"lift: object_layout '1\.6' is unknown"):
        Lift(object_layout="1.6")


def test_every_robosuite_name_has_its_task():
    assert {name: task.world.name for name, task in ROBOSUITE_TASKS.items()} == {
        "Lift": "lift",
        "PickPlaceCan": "can",
        "NutAssemblySquare": "square",
    }
    assert Can(images=True).spec.name == "can_image"


def test_without_robosuite_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "flowsteer.sim.tasks.robosuite_env", raising=False)
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(SimError, match=r"'robosuite': pip install 'flowsteer\[robosuite\]'"):
        Lift().make()


def test_from_rest_a_full_action_covers_what_the_spring_allows():
    # Critically damped, w = sqrt(150) = 12.25 1/s: 0.05 m * (1 - (1 + 0.6124) exp(-0.6124)) = 0.05 * 0.1260.
    gains = OscGains()
    zero = np.zeros(3)
    reached = gains.rollout(zero, zero, np.array([[1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 1.0]]), 0.05)
    np.testing.assert_allclose(reached, [[0.05 * 0.1260, -0.025 * 0.1260, 0.0]], atol=2e-6)
    np.testing.assert_allclose(gains.rollout(zero, zero, np.zeros((5, 7)), 0.05), 0.0)


@pytest.fixture(scope="module")
def eyes():
    env = Lift(images=True).make()
    try:
        env.render()
    except SimError as error:
        skip_without_graphics(error)
    yield env
    env.close()


def test_pictures_are_upright_and_pixels_are_where_things_are(eyes):
    observation = eyes.reset(0)
    assert observation["agentview_image"].shape == observation["robot0_eye_in_hand_image"].shape == (84, 84, 3)
    picture = eyes.render()
    assert picture.shape == (256, 256, 3)
    cube = eyes._data.body("cube_main").xpos[None]
    ((x, y),) = project(eyes._model, eyes._data, "agentview", 256, cube).round().astype(int)
    red, green, blue = picture[y, x].astype(int)
    assert red > green + 40
    assert red > blue + 40
    # The cube is the only red thing.
    reds = np.argwhere(picture[..., 0].astype(int) > picture[..., 1].astype(int) + 60)
    np.testing.assert_allclose(reds.mean(axis=0), [y, x], atol=4)


def test_actions_are_drawn_where_they_lead(eyes):
    eyes.reset(1)
    eyes.step(np.array([0.5, 0.5, 0, 0, 0, 0, 0]))  # moving already: the speed counts too
    chunk = np.zeros((12, 7))
    chunk[:, 1], chunk[6:, 2] = 1.0, -1.0
    ahead = eyes.project(chunk)
    assert ahead.shape == (12, 2)
    reached = []
    for action in chunk:
        eyes.step(action)
        reached.append(project(eyes._model, eyes._data, "agentview", 256, eyes._data.site_xpos[[eyes._grip_site]])[0])
    assert np.linalg.norm(ahead[-1] - ahead[0]) > 40
    np.testing.assert_allclose(ahead, reached, atol=9)  # the joints' friction costs the arm a tenth of its speed


def test_without_graphics_everything_but_pictures_works(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    env = Lift().make()
    assert os.environ["MUJOCO_GL"] == "vulkan"
    env.reset(0)
    with pytest.raises(SimError, match=r"cannot render off screen with MUJOCO_GL=vulkan .*: install libegl1") as caught:
        env.render()
    assert "\n" not in str(caught.value)
    assert np.isfinite(env.step(np.zeros(7)).observation["object"]).all()
    assert env.project(np.zeros((2, 7))).shape == (2, 2)
    env.close()


def test_robosuite_runs_where_opencv_finds_no_graphics(tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    script = (
        "import os, sys; from flowsteer.sim.tasks.robosuite import Lift; env = Lift().make(); "
        "print(env.reset(0)['object'].shape, 'cv2' in sys.modules, os.environ.get('MUJOCO_GL'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(10,) False None"]
    assert done.stderr == ""


def test_a_recorded_state_is_restored(lift):
    lift.reset(0)
    for action in actions(5):
        observation = lift.step(action).observation
    state = np.concatenate([[lift._data.time], lift._data.qpos, lift._data.qvel])
    lift.reset(0)
    restored = lift.set_state(state)
    for key in observation:
        np.testing.assert_allclose(restored[key], observation[key], atol=1e-6)
