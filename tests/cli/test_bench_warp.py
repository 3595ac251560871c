from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from flowsteer.cli import bench_warp
from flowsteer.cli.bench_warp import PARTS, Stopwatch
from flowsteer.cli.main import main


def test_the_time_of_a_chunk_is_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco_warp")
    options = ("tasks=[hopper]", "num_envs=[3]", "chunks=2", "device=cpu")
    assert main(["bench", "warp", *options, f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "warp.json").read_text())
    (row,) = result["rows"]
    assert (row["task"], row["num_envs"], result["device"]) == ("hopper", 3, "cpu")
    assert row["env_steps_per_s"] > 0
    parts = {part: row[f"{part}_ms"] for part in PARTS}
    assert all(milliseconds > 0 for milliseconds in parts.values()), parts
    assert max(parts, key=lambda part: parts[part]) == "physics", parts
    assert "warp.json" in capsys.readouterr().out


def test_what_was_watched_is_itself_again() -> None:
    pytest.importorskip("mujoco_warp")
    from flowsteer.sim.tasks.locomotion import Hopper
    from flowsteer.sim.warp_worlds import WarpWorlds

    task, before = Hopper(), (WarpWorlds.step, torch.Tensor.tolist)
    with bench_warp.watched(task, Stopwatch(torch.device("cpu"))):
        assert WarpWorlds.step is not before[0]
        assert "judge" in vars(task)
    assert (WarpWorlds.step, torch.Tensor.tolist) == before
    assert "tolist" not in vars(torch.Tensor)
    assert "judge" not in vars(task)


def test_a_part_inside_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("outer"), watch.part("inner"):
        pass
    # The outer part runs from 0 to 1 and from 3 to 7, the inner one from 1 to 3.
    assert watch.seconds == {"outer": 5.0, "inner": 2.0}


def test_a_failing_part_is_counted_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError, match="gone"), watch.part("part"):
        raise ValueError("gone")
    assert watch.seconds == {"part": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tasks=[hoper]"], "task 'hoper' is unknown; nearest: hopper"),
        (["tasks=[]"], "tasks is empty"),
        (["chunks=0"], "chunks must be positive, got 0"),
        (["num_envs=[0]"], "num_envs must be positive, got 0"),
        (["tasks=[pusht]"], "pusht: only MuJoCo tasks run in MuJoCo Warp"),
        (["device=gpu"], "device 'gpu' is unknown"),
    ],
)
def test_what_cannot_run_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "warp", *options, f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    assert main(["bench", "warp", f"out={tmp_path / 'out'}"]) == 1
    assert "pip install 'flowsteer[warp]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
