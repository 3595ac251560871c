"""Randomised worlds in MuJoCo Warp, on a CPU, against those on threads."""

import itertools

import numpy as np
import pytest
import torch
from changed_hopper import Like

from flowsteer.sim.backends import threads, warp
from flowsteer.sim.errors import SimError
from flowsteer.sim.tasks.locomotion import Hopper
from flowsteer.sim.tasks.randomization import Randomization
from flowsteer.sim.vec_env import IDLE

mujoco = pytest.importorskip("mujoco", reason="MuJoCo is not installed")
pytest.importorskip("mujoco_warp", reason="MuJoCo Warp is not installed: pip install 'flowsteer[warp]'")
pytest.importorskip("gymnasium.envs.mujoco", reason="the hopper's model is Gymnasium's")

B = 3
RANGES = {"body_mass": (0.5, 2.0), "geom_friction": (0.5, 1.5), "actuator_gear": (0.7, 1.3)}


@pytest.fixture(scope="module")
def env():
    """Three hoppers; whoever uses them resets them first."""
    with warp(Hopper(randomize=RANGES), B, 2) as env:
        yield env


def nominal():
    return Hopper().model()


def randomized(seed):
    """The hopper of the episode `seed` in MuJoCo."""
    model = nominal()
    if seed != IDLE:
        Randomization(model, RANGES).apply(model, mujoco.MjData(model), seed)
    return model


def assert_worlds_are_those_of_their_seeds(env):
    model = env._worlds._model
    for world, seed in enumerate(env.seeds):
        wanted = randomized(seed)
        # Named ones, and some that MuJoCo derives from the masses.
        for name in (*RANGES, "body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0"):
            np.testing.assert_allclose(getattr(model, name).numpy()[world], getattr(wanted, name), rtol=1e-6)
        np.testing.assert_allclose(model.stat.meaninertia.numpy()[world], wanted.stat.meaninertia, rtol=1e-6)


def test_episodes_equal_those_on_threads_also_after_others_have_begun(env):
    generator = torch.Generator().manual_seed(0)
    with threads(Hopper(randomize=RANGES), B, 2) as randomized, threads(Hopper(), B, 2) as plain:
        seeds = range(2 * B)
        torch.testing.assert_close(env.reset(seeds), randomized.reset(seeds), rtol=0, atol=0)
        plain.reset(seeds)
        for chunk in range(3):
            actions = 2 * torch.rand(B, 7, 3, generator=generator) - 1
            result, wanted, other = (each.step_chunk(actions) for each in (env, randomized, plain))
            torch.testing.assert_close(result.obs, wanted.obs, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(result.reward_sum, wanted.reward_sum, rtol=2e-3, atol=2e-3)
            assert env.seeds == randomized.seeds
            if chunk == 0:
                assert (result.final_obs["state"] - other.final_obs["state"]).abs().max() > 0.1, "nothing was changed"
    assert max(env.seeds) >= B, "no second episode was compared"
    assert_worlds_are_those_of_their_seeds(env)


def test_each_world_has_the_model_of_its_seed_and_an_idle_one_the_nominal_one(env):
    address = env._worlds._model.body_mass.ptr
    for seeds in ([3, 4, 5], [5, 3], [4]):
        env.reset(seeds)
        assert_worlds_are_those_of_their_seeds(env)
    assert env.seeds == (4, IDLE, IDLE)
    # A graph that was recorded goes on reading where it did.
    assert env._worlds._model.body_mass.ptr == address


def test_geoms_that_never_move_stand_elsewhere_in_each_world():
    def step(spec):
        box = spec.worldbody.add_geom(name="step", type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.1, 0.1, 0.1])
        box.pos = [2.0, 0.0, 0.5]

    ranges = {"geom_pos": (0.5, 2.0)}
    task = Like(step, ranges)
    model = task.model()
    box = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "step")
    factors = [Randomization(model, ranges).factors(seed)["geom_pos"][box] for seed in range(2)]
    wanted = np.array([[2.0 * factor, 0, 0.5 * factor] for factor in factors])
    with warp(task, 2, 1) as env:
        env.reset(itertools.count())
        env.step_chunk(torch.zeros(2, 1, 3))
        np.testing.assert_allclose(env._worlds._data.geom_xpos.numpy()[:, box], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "geom_fluid",
            "hopper: MuJoCo Warp cannot have another geom_fluid in each world, .*choose sim.backend=threads",
        ),
        ("body_mas", "randomize.body_mas is no field of the model that can be scaled; nearest: body_mass"),
    ],
)
def test_what_cannot_differ_between_worlds_is_refused_by_name(name, message):
    with pytest.raises(SimError, match=message):
        warp(Hopper(randomize={"body_mass": (0.5, 1.5), name: (0.5, 1.5)}), 1, 1)
