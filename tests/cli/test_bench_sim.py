from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowsteer.cli.main import main
from flowsteer.cli.sim_contenders import BARE, Size, Trace, bare, traced_threads
from flowsteer.sim.tasks.locomotion import Hopper

pytest.importorskip("mujoco")


def bench(out: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["bench", "sim", *options, f"out={out}"]) == 0
    rows: list[dict[str, Any]] = json.loads((out / "sim.json").read_text())["rows"]
    return rows


def test_every_contender_gets_a_row_and_the_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(tmp_path, "num_envs=[2]", "seconds=0.05")
    rates = {row["contender"]: row["env_steps_per_s"] for row in rows}
    assert list(rates) == ["gym", "threads", "bare mujoco.rollout", "gymnasium sync", "gymnasium async"]
    for row in rows:
        assert row["x_bare"] == pytest.approx(row["env_steps_per_s"] / rates["bare mujoco.rollout"], rel=2e-3)
        assert row["x_sync"] == pytest.approx(row["env_steps_per_s"] / rates["gymnasium sync"], rel=2e-3)
        assert row["x_async"] == pytest.approx(row["env_steps_per_s"] / rates["gymnasium async"], rel=2e-3)
        assert "x_robosuite" not in row
    assert (tmp_path / "sim.png").stat().st_size > 0
    assert "x async" in capsys.readouterr().out


def test_the_bare_physics_does_again_what_the_back_end_did() -> None:
    mujoco, rollout = pytest.importorskip("mujoco"), pytest.importorskip("mujoco.rollout")
    task, size, trace = Hopper(), Size(num_envs=3, chunk_steps=2), Trace()
    with traced_threads(task, size, trace) as threads, bare(task, size, trace) as alone:
        assert threads(0.02) > 0
        assert alone(0.02) > 0
    states, chunks = (np.stack(part) for part in zip(*trace.decisions, strict=True))
    assert 0 < trace.env_steps <= 3 * 2 * len(states)
    assert np.abs(np.diff(states[:, :, 1:], axis=0)).max() > 1e-3, "the same start again and again"
    model = task.model()
    with rollout.Rollout(nthread=1) as pool:
        control = np.repeat(chunks[0].astype(np.float64), task.frame_skip, axis=1)
        after, _ = pool.rollout(model, [mujoco.MjData(model)], states[0], control)
    np.testing.assert_array_equal(after[:, -1], states[1])


def test_tasks_and_batches_share_a_run_and_others_keep_to_small_ones(tmp_path: Path) -> None:
    options = ("tasks=[halfcheetah,pusht_mj]", "backends=[threads]", "num_envs=[1,2]", "seconds=0.02", "others_up_to=1")
    rows = bench(tmp_path, *options)
    seen = {(row["task"], row["num_envs"], row["contender"]) for row in rows}
    ours = {(task, n, name) for task in ("halfcheetah", "pusht_mj") for n in (1, 2) for name in ("threads", BARE)}
    assert seen == ours | {("halfcheetah", 1, "gymnasium sync"), ("halfcheetah", 1, "gymnasium async")}
    assert all(row["x_sync"] is None for row in rows if row["num_envs"] == 2)


def test_the_light_arm_runs_beside_robosuites(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    options = ("tasks=[arm_lift]", "backends=[threads]", "num_envs=[4]", "chunk_steps=1", "seconds=0.05")
    rows = {row["contender"]: row for row in bench(tmp_path, *options)}
    assert list(rows) == ["threads", BARE, "robosuite lift"]
    assert rows["robosuite lift"]["x_robosuite"] == 1
    assert rows["threads"]["x_robosuite"] > 1


def test_a_task_of_gymnasiums_kind_alone_runs_in_one_back_end(tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht")
    (row,) = bench(tmp_path, "tasks=[pusht]", "num_envs=[1]", "seconds=0.02")
    assert (row["contender"], row["num_envs"], row.keys() & {"x_bare", "x_sync"}) == ("gym", 1, set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tasks=[hoper]"], "task 'hoper' is unknown; nearest: hopper"),
        (["backends=[thread]"], "backend 'thread' is unknown; nearest: threads"),
        (["tasks=[]"], "tasks is empty: give at least one, 'tasks=[a,b]'"),
        (["backends=[]"], "backends is empty: give at least one"),
        (["seconds=0"], "seconds must be positive, got 0"),
        (["chunk_steps=-1"], "chunk_steps must be positive, got -1"),
        (["tasks=[pusht]", "backends=[threads]"], "task 'pusht' runs in none of the back ends threads"),
        (["device=gpu"], "device 'gpu' is unknown"),
    ],
)
def test_what_cannot_run_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sim", *options, "num_envs=[1]", f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
