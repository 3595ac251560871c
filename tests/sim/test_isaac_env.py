"""The Isaac adapter on a task that obeys the documented tensors of IsaacGymEnvs. Isaac Gym itself is not run."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from point_mass import DT_S, PointMass
from torch.utils._python_dispatch import TorchDispatchMode

from flowsteer.sim.errors import SimError
from flowsteer.sim.isaac_env import IsaacVecEnv
from flowsteer.sim.isaac_gym import isaac
from flowsteer.sim.vec_env import IDLE


def make(num_envs, observation_steps=1, success=None, **options):
    return IsaacVecEnv(PointMass(num_envs, **options), "point", observation_steps, success)


def chunk(*rows):
    """Actions [B, Ta, 1] from B lists."""
    return torch.tensor(rows, dtype=torch.float32)[..., None]


def motion(start, forces):
    """The states [T, 2] of one point mass that starts at rest."""
    x, v = float(start), 0.0
    states = []
    for force in forces:
        v += DT_S * force
        x += DT_S * v
        states.append([x, v])
    return torch.tensor(states)


def test_the_spec_is_read_off_the_task():
    spec = make(2).spec
    assert (spec.name, spec.action_dim, spec.control_hz, spec.max_episode_steps) == ("point", 1, 2.0, 6)
    assert spec.observations["state"].shape == (2,)


def test_a_chunk_is_executed_open_loop_and_the_window_holds_the_last_steps():
    env = make(2, observation_steps=3)
    first = env.reset(itertools.count())["state"]
    assert first.shape == (2, 3, 2)
    assert torch.equal(first[:, 0], first[:, 2])
    assert (first[:, 0, 1] == 0).all()
    result = env.step_chunk(chunk([0.1, 0.2], [0.0, -0.3]))
    for i, forces in enumerate(([0.1, 0.2], [0.0, -0.3])):
        states = motion(first[i, 0, 0], forces)
        torch.testing.assert_close(result.obs["state"][i], torch.cat([first[i, :1], states]))
        torch.testing.assert_close(result.reward_sum[i], states[:, 0].sum())
        torch.testing.assert_close(result.info["reward_max"][i], states[:, 0].max())
    assert result.info["env_steps"].tolist() == [2, 2]
    assert not result.ended.any()
    more = env.step_chunk(chunk([0.0, 0.0], [0.0, 0.0])).obs["state"]
    torch.testing.assert_close(more[0, -1], motion(first[0, 0, 0], [0.1, 0.2, 0, 0])[-1])
    torch.testing.assert_close(more[0, 0], motion(first[0, 0, 0], [0.1, 0.2])[-1])


def test_a_chunk_stops_where_the_rule_ends_the_episode_and_the_next_one_is_fresh():
    env = make(3)
    first = env.reset(range(9))["state"]
    result = env.step_chunk(chunk([1] * 5, [0] * 5, [-1] * 5))
    # From |x0| <= 0.5 under full force: 0.25, 0.75, 1.5, 2.5 m further on after 1 to 4 steps.
    paths = [motion(first[i, 0, 0], [force] * 5) for i, force in enumerate((1, 0, -1))]
    steps = [next((t + 1 for t in range(5) if abs(path[t, 0]) > 2), 5) for path in paths]
    assert steps[1] == 5
    assert max(steps[0], steps[2]) < 5, "nothing ended inside the chunk"
    assert result.info["env_steps"].tolist() == steps
    assert result.terminated.tolist() == [True, False, True]
    assert not result.truncated.any()
    for i, path in enumerate(paths):
        torch.testing.assert_close(result.final_obs["state"][i, 0], path[steps[i] - 1])
        torch.testing.assert_close(result.reward_sum[i], path[: steps[i], 0].sum())
    fresh = result.obs["state"][:, 0]
    assert (fresh[[0, 2], 0].abs() <= 0.5).all()
    assert (fresh[[0, 2], 1] == 0).all()
    assert torch.equal(fresh[1], result.final_obs["state"][1, 0])
    assert env.seeds == (3, 1, 4)
    assert result.info["seed"].tolist() == [0, 1, 2]
    after = env.step_chunk(chunk([0.5], [0], [0.5]))
    for i in (0, 2):
        torch.testing.assert_close(after.obs["state"][i, 0], motion(fresh[i, 0], [0.5])[0])


def test_the_time_limit_truncates_and_every_episode_gets_all_of_its_steps():
    env = make(2)
    env.reset(range(4))
    lengths = {}
    while any(seed != IDLE for seed in env.seeds):
        result = env.step_chunk(chunk([0, 0, 0, 0], [0, 0, 0, 0]))
        for seed, steps, truncated in zip(
            *(x.tolist() for x in (result.info["seed"], result.info["env_steps"], result.truncated)), strict=True
        ):
            lengths.setdefault(seed, []).append((steps, truncated))
        assert not result.terminated.any()
    assert lengths == {seed: [(4, False), (2, True)] for seed in range(4)}


def test_a_restart_does_not_shorten_the_episodes_of_the_others():
    env = make(2)
    env.reset(range(9))
    env.step_chunk(chunk([1] * 4, [0] * 4))
    assert env.step_chunk(chunk([0], [0])).truncated.tolist() == [False, False]
    assert env.step_chunk(chunk([0], [0])).truncated.tolist() == [False, True]


def test_the_task_resets_nothing_in_the_middle_of_a_chunk():
    env = make(2)
    env.reset(range(9))
    before = env._task.resets
    env.step_chunk(chunk([1] * 20, [-1] * 20))
    assert env._task.resets == before + 2


def test_environments_stay_idle_when_the_seeds_run_out():
    env = make(3)
    env.reset(range(2))
    assert env.seeds == (0, 1, IDLE)
    result = env.step_chunk(chunk([1] * 6, [0] * 6, [float("nan")] * 6))
    assert result.info["active"].tolist() == [True, True, False]
    assert result.info["env_steps"].tolist()[1:] == [6, 0]
    assert result.ended.tolist() == [True, True, False]
    assert torch.equal(result.obs["state"], result.final_obs["state"])
    assert env.seeds == (IDLE,) * 3
    result = env.step_chunk(chunk([1], [1], [1]))
    assert result.info["env_steps"].tolist() == [0, 0, 0]
    assert result.reward_sum.tolist() == result.info["reward_max"].tolist() == [0, 0, 0]


def test_actions_are_clipped_checked_and_lose_only_their_episode():
    env = make(2)
    first = env.reset(range(9))["state"]
    result = env.step_chunk(chunk([50], [float("nan")]))
    torch.testing.assert_close(result.obs["state"][0, 0], motion(first[0, 0, 0], [1])[0])
    assert result.info["lost"].tolist() == [False, True]
    assert result.info["env_steps"].tolist() == [1, 0]
    assert env.seeds == (0, 2)
    with pytest.raises(SimError, match="point: no environment got finite actions"):
        env.step_chunk(chunk([float("inf")], [float("nan")]))
    with pytest.raises(SimError, match=r"point: actions must be \[2, Ta, 1\], got \[2, 1\]"):
        env.step_chunk(torch.zeros(2, 1))


def test_a_world_that_blows_up_is_lost_and_starts_again():
    env = make(2)
    env.reset(range(9))
    env._task.v[1] = torch.nan
    result = env.step_chunk(chunk([0, 0], [0, 0]))
    assert result.info["lost"].tolist() == [False, True]
    assert result.info["env_steps"].tolist() == [2, 1]
    assert not (result.terminated | result.truncated).any()
    assert result.reward_sum.isfinite().all()
    assert result.obs["state"].isfinite().all()
    assert env.seeds == (0, 2)


def test_success_is_asked_of_the_task_at_every_executed_step():
    env = make(2, success=lambda task: task.x > 1)
    env.reset(range(9))
    # From |x0| <= 0.5: at least 1 m after three steps ahead, then the brake.
    result = env.step_chunk(chunk([1, 1, 1, -1, -1], [-1] * 5))
    assert result.info["success"].tolist() == [True, False]


class Waits(TorchDispatchMode):
    """Counts operations of the adapter that make the host wait for the device, or leave the device."""

    def __init__(self, task):
        super().__init__()
        self._task, self.count = task, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "_to_copy", "item", "masked_select")
        self.count += not self._task.stepping and function.__name__.split(".")[0] in waiting
        return function(*args, **kwargs or {})


def test_nothing_in_the_loop_waits_for_the_device():
    def waits(chunk_steps):
        env = make(4, max_episode_length=1000)
        env.reset(range(99))
        with Waits(env._task) as mode:
            env.step_chunk(torch.zeros(4, chunk_steps, 1))
        return mode.count

    assert 0 < waits(1) == waits(40)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_tensors_stay_on_the_device_of_the_task(device):
    env = make(2, device=device)
    assert env.device.type == device
    env.reset(range(9))
    result = env.step_chunk(torch.ones(2, 5, 1))
    tensors = [*result.obs.values(), *result.final_obs.values(), *result.info.values()]
    tensors += [result.reward_sum, result.terminated, result.truncated]
    assert {tensor.device.type for tensor in tensors} == {device}


def test_results_are_copies_that_later_steps_leave_alone():
    env = make(1)
    env.reset(range(9))
    result = env.step_chunk(chunk([0.3]))
    kept, reward = result.obs["state"].clone(), result.reward_sum.clone()
    env.step_chunk(chunk([0.3, 0.3]))
    assert torch.equal(result.obs["state"], kept)
    assert torch.equal(result.reward_sum, reward)


def test_a_task_that_resets_more_than_environments_is_refused():
    class Hand(PointMass):
        def reset_idx(self, env_ids, goal_env_ids):
            raise NotImplementedError

    with pytest.raises(SimError, match="hand: reset_idx takes more than env_ids"):
        IsaacVecEnv(Hand(1), "hand", 1)


def test_closing_destroys_the_simulation_once():
    class Gym:
        def __init__(self):
            self.calls = []

        def destroy_sim(self, sim):
            self.calls.append(("sim", sim))

        def destroy_viewer(self, viewer):
            self.calls.append(("viewer", viewer))

    task = PointMass(1)
    task.gym, task.sim, task.viewer = Gym(), 7, 8
    with IsaacVecEnv(task, "point", 1) as env:
        env.close()
    assert task.gym.calls == [("viewer", 8), ("sim", 7)]


def test_torch_before_isaacgym_is_refused_with_the_remedy():
    with pytest.raises(SimError, match="make 'import isaacgym' the first line of the script"):
        isaac("Ant", 2, 1)


def fresh_python(code, *paths):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)


def test_a_missing_isaac_gym_is_told_in_one_line():
    ended = fresh_python("from flowsteer.sim.isaac_gym import isaac; isaac('Ant', 2, 1)")
    told = ended.stderr.strip().splitlines()[-1]
    assert "SimError: 'isaacgym' cannot be imported here" in told
    assert "Preview 4" in told


def test_isaacgym_is_imported_before_torch(tmp_path):
    for name, text in {
        "isaacgym": "import sys\nif 'torch' in sys.modules:\n    raise ImportError('torch came first')\n",
        "isaacgymenvs": (
            "def make(seed, task, num_envs, sim_device, rl_device, graphics_device_id=-1, headless=False):\n"
            "    from point_mass import PointMass\n"
            "    assert (task, sim_device, rl_device) == ('Ant', 'cpu', 'cpu')\n"
            "    assert (graphics_device_id, headless) == (-1, True)\n"
            "    return PointMass(num_envs, device=rl_device)\n"
        ),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    code = (
        "from flowsteer.sim.isaac_gym import isaac\n"
        "env = isaac('Ant', 3, 2, device='cpu')\n"
        "print(env.spec.name, tuple(env.reset(range(3))['state'].shape))\n"
    )
    ended = fresh_python(code, tmp_path, Path(__file__).parent)
    assert ended.stdout.strip() == "Ant (3, 2, 2)", ended.stderr
