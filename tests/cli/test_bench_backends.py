from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowsteer.cli import bench_backends
from flowsteer.cli.bench_backends import LinearPolicy, Played, observed_differences, play, relative_difference
from flowsteer.cli.main import main
from flowsteer.sim.backends import gym, threads
from flowsteer.sim.tasks.locomotion import Hopper
from flowsteer.sim.tasks.pusht_mj import PushTMujoco

pytest.importorskip("mujoco")


def bench(out: Path, *options: str) -> dict[str, Any]:
    assert main(["bench", "backends", *options, f"out={out}"]) == 0
    result: dict[str, Any] = json.loads((out / "backends.json").read_text())
    return result


def test_back_ends_that_are_the_same_differ_by_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("backends=[threads,gym]", "episodes=6", "num_envs=4", "candidates=4")
    result = bench(tmp_path, *options)
    one, other = result["rows"]
    assert (one["backend"], other["backend"]) == ("threads", "gym")
    assert one["return"] == pytest.approx(other["return"], rel=1e-6)
    assert one["return"]["low"] < one["return"]["mean"] < one["return"]["high"]
    assert one["env_steps"] == other["env_steps"] >= 6
    assert one["difference_1"] is None
    assert other["difference_1"] == pytest.approx(0, abs=1e-6)
    assert other["relative"]["mean"] == pytest.approx(0, abs=1e-6)
    assert 0 <= result["policy_seed"] < 4
    assert "backends.json" in capsys.readouterr().out


def test_warp_agrees_with_threads(tmp_path: Path) -> None:
    pytest.importorskip("mujoco_warp")
    _, warp = bench(tmp_path, "episodes=2", "candidates=1", "device=cpu")["rows"]
    assert warp["lost"] == 0
    assert 0 < warp["difference_1"] < 1e-3
    assert abs(warp["relative"]["mean"]) < 0.05


def test_the_relative_difference_is_of_the_means() -> None:
    difference = relative_difference(np.array([-1.0, -2.0, -4.5]), np.array([-1.0, -2.0, -3.0]))
    assert difference is not None
    mean, low, high = difference
    assert mean == pytest.approx(-0.5 / 2)
    assert low < mean < high <= 0
    assert relative_difference(np.ones(3), np.zeros(3)) is None


def test_what_is_relative_to_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_backends, "play", lambda *args: Played(np.zeros(2), np.zeros(2, bool), 8, 0.1))
    rows = bench(tmp_path, "backends=[threads,gym]", "episodes=2", "candidates=1")["rows"]
    assert [row["relative"] for row in rows] == 2 * ["reference return is 0 or lost"]


def test_returns_belong_to_their_seeds_whatever_the_batch() -> None:
    policy = LinearPolicy(Hopper.spec, 3)
    with threads(Hopper(), 2, 1) as few, threads(Hopper(), 5, 1) as many:
        one, other = play(few, policy, range(7, 12), 4), play(many, policy, range(7, 12), 4)
    np.testing.assert_allclose(one.returns, other.returns, rtol=1e-6)
    assert len(set(one.returns)) == 5
    assert one.env_steps == other.env_steps
    assert not one.lost.any()


def test_another_world_is_told_after_one_step() -> None:
    light = Hopper(randomize={"body_mass": (0.5, 0.5)})
    with threads(Hopper(), 3, 1) as one, gym(light, 3, 1, workers=0) as other:
        policy = LinearPolicy(Hopper.spec, 3)
        found = observed_differences(one, other, policy, range(3))
        assert found["difference_1"] is not None
        assert found["difference_1"] > 0.01
        assert observed_differences(one, one, policy, range(3)) == {"difference_1": None, "difference_20": None}


def test_actions_are_within_the_limits_and_follow_what_is_seen() -> None:
    policy = LinearPolicy(PushTMujoco.spec, 0)
    seen = {"agent_position": 512 * torch.rand(50, 2, 2), "block_pose": 512 * torch.rand(50, 2, 4)}
    chunk = policy(seen, 3)
    assert chunk.shape == (50, 3, 2)
    assert (chunk[:, 0] == chunk[:, 2]).all()
    assert chunk.min() >= 0
    assert chunk.max() <= 512
    assert chunk[:, 0].std(dim=0).min() > 1
    torch.testing.assert_close(chunk, LinearPolicy(PushTMujoco.spec, 0)(seen, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["task=hoper"], "task 'hoper' is unknown; nearest: hopper"),
        (["backends=[threads,wrap]"], "backend 'wrap' is unknown; nearest: warp"),
        (["backends=[gym,gym]"], "backends names one twice"),
        (["backends=[]"], "backends is empty"),
        (["episodes=0"], "episodes must be positive, got 0"),
        (["seed=-1"], "seed must be from 0"),
    ],
)
def test_what_cannot_run_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "backends", *options, f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
