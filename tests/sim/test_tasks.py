import pickle
from importlib.util import find_spec

import pytest
import torch
from graphics import skip_without_graphics

from flowsteer.sim.backends import gym
from flowsteer.sim.errors import SimError, optional_module
from flowsteer.sim.tasks.arm_lift import ArmLift
from flowsteer.sim.tasks.gymnasium_robotics import AdroitDoor, Kitchen
from flowsteer.sim.tasks.locomotion import HalfCheetah, Hopper, Walker2d
from flowsteer.sim.tasks.pusht import PushT
from flowsteer.sim.tasks.pusht_mj import PushTMujoco
from flowsteer.sim.tasks.robosuite import Can, Lift, Square

TASKS = {
    "pusht": PushT(),
    "pusht_features": PushT("features"),
    "pusht_keypoints": PushT("keypoints"),
    "pusht_image": PushT("image"),
    "lift": Lift(),
    "pusht_mj": PushTMujoco(),
    "lift_image": Lift(images=True, cameras=("agentview",)),
    "can": Can(),
    "can_image": Can(images=True, cameras=("agentview",)),
    "square": Square(),
    "square_image": Square(images=True, cameras=("agentview",)),
    "hopper": Hopper(),
    "walker2d": Walker2d(),
    "halfcheetah": HalfCheetah(),
    "arm_lift": ArmLift(),
    "kitchen": Kitchen(),
    "adroit_door": AdroitDoor(),
}
NEEDS = {
    "pusht": "gym_pusht",
    "robosuite": "robosuite",
    "locomotion": "mujoco",
    "pusht_mj": "mujoco",
    "arm_lift": "robosuite",
    "gymnasium_robotics": "gymnasium_robotics",
}
"""Module of a task -> the package of its simulator."""
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


def roll(task, seeds):
    """Every result of random chunks in two environments, the actions tied to the seed and not to the place."""
    spec = task.spec
    # Software renders a tenth of a second for each picture; longer episodes are those of the same task without it.
    pictures = task.heavy and any(array.dtype == "uint8" for array in spec.observations.values())
    chunks, steps = (4, 1) if pictures else (20, 3)
    low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
    generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    with gym(task, 2, 2, workers=0) as env:
        results = [env.reset(list(seeds))]
        for _ in range(chunks):
            unit = torch.stack([torch.rand(steps, spec.action_dim, generator=generators[s]) for s in seeds])
            result = env.step_chunk(low + unit * (high - low))
            outcome = {"reward": result.reward_sum, "ended": result.ended, **result.info}
            results += [result.obs, result.final_obs, outcome]
    return results


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_what_it_promises_and_repeats_it_from_its_seed(name):
    task = TASKS[name]
    assert task.spec.name == name
    assert len(task.spec.action_low) == len(task.spec.action_high) == task.spec.action_dim
    assert pickle.loads(pickle.dumps(task)).spec == task.spec
    needs = NEEDS[type(task).__module__.rpartition(".")[2]]
    if find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    try:
        results = roll(task, (3, 4))
    except SimError as error:
        skip_without_graphics(error)
    for observation in (*results[0::3][:1], *results[1::3], *results[2::3]):
        assert observation.keys() == task.spec.observations.keys()
        for key, array in task.spec.observations.items():
            assert observation[key].shape == (2, 2, *array.shape)
            assert observation[key].dtype == DTYPES[array.dtype]
            assert observation[key].float().isfinite().all()
    assert all(outcome["reward"].isfinite().all() for outcome in results[3::3])
    assert not all(torch.equal(value[0], value[1]) for value in results[-3].values()), "seeds must differ"
    for one, other in zip(results, roll(task, (4, 3)), strict=True):
        assert all(torch.equal(one[key], other[key].flip(0)) for key in one)


def test_only_missing_graphics_excuse_a_task():
    with pytest.raises(pytest.skip.Exception, match="MUJOCO_GL=egl"):
        skip_without_graphics(SimError("cannot render off screen with MUJOCO_GL=egl (no library): install libegl1"))
    with pytest.raises(SimError, match="the arm came off"):
        skip_without_graphics(SimError("lift: the arm came off"))


def test_an_unknown_choice_is_named_with_the_known_ones():
    with pytest.raises(SimError, match=r"pusht: observation 'pixels' is unknown, choose one of \['features', "):
        PushT("pixels")
    with pytest.raises(SimError, match=r"kitchen: subtasks \['oven'\], choose of bottom burner, top burner, "):
        Kitchen(subtasks=("oven", "kettle"))
    with pytest.raises(SimError, match="kitchen: subtasks is empty"):
        Kitchen(subtasks=())


def test_a_missing_package_is_one_line_with_its_extra():
    with pytest.raises(
        SimError, match=r"this needs the package of 'no_such_simulator': pip install 'flowsteer\[nosim\]'"
    ):
        optional_module("no_such_simulator", "nosim")


def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_simulator.py").write_text("raise AttributeError('no glGetError')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(
        SimError, match=r"cannot be imported \(AttributeError: no glGetError\); MUJOCO_GL=egl is set: unset"
    ):
        optional_module("broken_simulator", "nosim")


def test_grippers_are_named_as_discrete():
    for task in (ArmLift(), Can(), Lift(), Square()):
        assert task.spec.discrete == (task.spec.action_dim - 1,), task.spec.name
