from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowsteer.cli.main import main

pytest.importorskip("mujoco")


def test_every_contender_gets_a_row_and_the_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sim", "num_envs=[2]", "seconds=0.05", f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "sim.json").read_text())
    rates = {row["contender"]: row["env_steps_per_s"] for row in result["rows"]}
    assert list(rates) == ["gym", "threads", "bare mujoco.rollout", "gymnasium sync", "gymnasium async"]
    for row in result["rows"]:
        assert row["x_sync"] == pytest.approx(row["env_steps_per_s"] / rates["gymnasium sync"])
        assert row["x_async"] == pytest.approx(row["env_steps_per_s"] / rates["gymnasium async"])
    assert (tmp_path / "sim.png").stat().st_size > 0
    assert "gymnasium async" in capsys.readouterr().out


def test_a_task_of_gymnasiums_kind_alone_runs_in_one_back_end(tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht")
    assert main(["bench", "sim", "tasks=[pusht]", "num_envs=[1]", "seconds=0.02", f"out={tmp_path}"]) == 0
    (row,) = json.loads((tmp_path / "sim.json").read_text())["rows"]
    assert (row["contender"], row["num_envs"]) == ("gym", 1)


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
    ],
)
def test_what_cannot_run_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sim", *options, "num_envs=[1]", f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
