import numpy as np
import pytest
from rolling import roll

from flowsteer.sim.backends import gym, threads
from flowsteer.sim.errors import SimError
from flowsteer.sim.rollout_pool import RolloutPool
from flowsteer.sim.tasks.arm_lift import ArmLift
from flowsteer.sim.tasks.locomotion import Hopper
from flowsteer.sim.tasks.randomization import Randomization

mujoco = pytest.importorskip("mujoco")
RANGES = {"body_mass": (0.5, 2.0), "geom_friction": (0.5, 1.5), "actuator_gear": (0.7, 1.3)}


def test_every_row_gets_its_own_factor_in_the_range_from_the_seed():
    nominal, model = Hopper().model(), Hopper().model()
    randomization = Randomization(model, RANGES)
    for seed in (3, 4, 3):
        randomization.apply(model, mujoco.MjData(model), seed)
        for name, (low, high) in RANGES.items():
            before, after = getattr(nominal, name), getattr(model, name)
            rows = (after[1:] / np.where(before[1:] == 0, 1, before[1:])).reshape(len(before) - 1, -1)[:, 0]
            assert ((rows >= low) & (rows <= high)).all()
            assert len(set(rows.round(9))) == len(rows), "rows share a factor"
            np.testing.assert_allclose(after[1:], before[1:] * rows.reshape(-1, *(1,) * (before.ndim - 1)))
        # What follows from the masses follows.
        np.testing.assert_allclose(model.body_subtreemass[0], model.body_mass.sum())
    repeated = randomization.factors(3)
    assert all(np.array_equal(repeated[name], randomization.factors(3)[name]) for name in RANGES)
    assert not np.array_equal(repeated["body_mass"], randomization.factors(4)["body_mass"])


def test_threads_give_what_single_worlds_give_in_worlds_of_their_own():
    task = Hopper(randomize=RANGES)
    alone, together = roll(gym, task, 5, 12), roll(threads, task, 5, 12)
    plain = roll(threads, Hopper(), 5, 12)
    for one, other in zip(alone, together, strict=True):
        for key, value in one.items():
            np.testing.assert_allclose(value, other[key], rtol=1e-5, atol=1e-5)
    assert not np.allclose(together[1]["state"], plain[1]["state"], atol=1e-3), "the worlds are not other worlds"


def test_an_episode_does_not_depend_on_the_world_that_runs_it():
    pool = RolloutPool(Hopper(randomize=RANGES), 2, 1)
    chunk = np.full((20, 3), 0.3, np.float32)
    pool.start({0: 5, 1: 6})
    pool.run({0: chunk, 1: chunk})
    first = pool.windows["state"][0].copy()
    pool.start({0: 9, 1: 5})
    pool.run({0: chunk, 1: chunk})
    np.testing.assert_array_equal(pool.windows["state"][1], first)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"body_mas": (1, 2)}, "randomize.body_mas is no field of the model that can be scaled; nearest: body_mass"),
        ({"body_parentid": (1, 2)}, "randomize.body_parentid is no field of the model that can be scaled"),
        ({"body_mass": (2, 1)}, r"randomize.body_mass must be two factors, 0 <= low <= high, got \[2, 1\]"),
        (
            {"dof_invweight0": (1, 2)},
            "randomize.dof_invweight0 is computed from other fields of the model: scale those",
        ),
        (
            {"geom_size": (1, 2)},
            "randomize.geom_size would leave MuJoCo's bounding volumes behind: change sizes in the",
        ),
        (
            {"geom_margin": (1, 2)},
            "randomize.geom_margin would leave MuJoCo's bounding volumes behind: change sizes in the",
        ),
        *(
            ({name: (1, 2)}, f"randomize.{name} holds directions of length 1, which no factor may change: leave it out")
            for name in ("body_quat", "body_iquat", "geom_quat", "jnt_axis", "light_dir", "eq_data")
        ),
        ({"body_mass": (1,)}, r"randomize.body_mass must be two factors, 0 <= low <= high, got \[1\]"),
    ],
)
def test_what_cannot_be_scaled_is_refused(ranges, message):
    with pytest.raises(SimError, match=message):
        threads(Hopper(randomize=ranges), 1, 1)


def test_a_task_with_sensors_starts_with_those_of_its_own_world():
    pytest.importorskip("robosuite")
    task = ArmLift(randomize={"body_pos": (0.9, 1.1)})
    pool, env = RolloutPool(task, 2, 1), task.make()
    pool.start({0: 1, 1: 2})
    seen = env.reset(2)
    for key, window in pool.windows.items():
        np.testing.assert_allclose(window[1, 0], seen[key], atol=1e-6)


def beam(x, y):
    """Three boxes in a row: at (-x, -y), in the middle and at (x, y)."""
    return "".join(f'<geom type="box" size=".1 .1 .1" pos="{side * x} {side * y} 0"/>' for side in (-1, 0, 1))


def test_geoms_that_were_moved_still_collide():
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><worldbody>
        <body>{beam(0.3, 0)}</body>
        <body pos="1.2 0 .15"><freejoint/>{beam(0, 0.3)}</body>
        </worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    # An outer box of the first beam comes to 1.2 m, below the middle box of the second.
    Randomization(model, {"geom_pos": (4, 4)}).apply(model, data, 0)
    mujoco.mj_forward(model, data)
    assert data.ncon == 4
