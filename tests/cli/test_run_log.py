from __future__ import annotations

import json
import math
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowsteer.cli.errors import UsageError
from flowsteer.cli.files import write_json
from flowsteer.cli.run_log import METRICS, Metrics, RunLog, read_metrics
from flowsteer.datasets.progress import ProgressBar
from flowsteer.sim.errors import SimError


def scores(value: float) -> dict[str, float]:
    return {"eval/success": value, "eval/success_low": value - 0.1, "eval/success_high": value + 0.1}


def test_numbers_reach_the_file_tensorboard_and_the_plots(tmp_path: Path) -> None:
    with RunLog(tmp_path, 20) as log:
        log.log(10, {"train/loss": 0.5, "train/lr": 1e-3})
        log.log(20, {"train/loss": math.nan})
        assert not (tmp_path / "loss.png").exists()
        log.log(20, scores(0.4))
        assert (tmp_path / "success.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert rows[0] == {"step": 10, "train/loss": 0.5, "train/lr": 1e-3}
    assert rows[1] == {"step": 20, "train/loss": None}
    assert (tmp_path / "loss.png").is_file()
    events = EventAccumulator(str(tmp_path)).Reload()
    first = events.Scalars("train/loss")[0]
    assert (first.step, first.value) == (10, 0.5)


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with RunLog(tmp_path, 40) as log:
        for step in (10, 20, 30):
            log.log(step, {"train/loss": float(step)})
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 35, "train/lo')
    # TensorBoard reads files by their names, the second first; those of one second by a count whose 10 comes before 9.
    time.sleep(1)
    with RunLog(tmp_path, 40, start=20) as log:
        log.log(30, {"train/loss": 7.0})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / METRICS)] == [
        (10, 10),
        (20, 20),
        (30, 7),
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 10), (20, 20), (30, 7)]


def test_without_a_terminal_lines_come_at_most_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("flowsteer.datasets.progress.time.monotonic", lambda: now[0])
    with RunLog(tmp_path, 1000, start=100) as log:
        for second in range(1, 26):
            now[0] = float(second)
            log.log(100 + second * 10, {"train/loss": 0.25})
        with ProgressBar("judging step 350", 4, "episodes") as bar:
            now[0] = 35.0
            bar.advance()
        log.log(350, scores(0.5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training 110/1000 steps  loss 0.25  10.0 steps/s  1:29 left"
    assert lines[3] == "judging step 350 1/4 episodes  0.100 episodes/s  0:30 left"
    assert [line.split()[1] for line in lines if line.startswith("training ")] == [
        "110/1000",
        "210/1000",
        "310/1000",
        "350/1000",
    ]
    assert "success 0.5 [0.4, 0.6]" in lines[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / METRICS, 0)
    with Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), metrics._stream.fileno())
    told = rf"{tmp_path / METRICS} cannot be written \(No space left on device\): free disk space"
    with pytest.raises(SimError, match=told):
        metrics.log(10, {"train/loss": 0.5})
    with pytest.raises(SimError, match="cannot be written"):
        metrics.close()


def test_wandb_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'flowsteer\[wandb\]'"):
        RunLog(tmp_path, 10, wandb={})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_wandb_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    sent: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((step, values))

        def finish(self) -> None:
            sent.append((-1, {}))

    def init(**options: Any) -> Run:
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 10):
        with RunLog(tmp_path, 20, start=start, wandb={"project": "arms"}) as log:
            log.log(start + 10, {"train/loss": 1.0})
    assert started[0] == started[1]
    assert started[0]["project"] == "arms"
    assert sent == [(10, {"train/loss": 1.0}), (-1, {}), (20, {"train/loss": 1.0}), (-1, {})]


def test_json_files_hold_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "table.json", {"a": [1.0, math.nan, (math.inf,)]})
    assert json.loads((tmp_path / "table.json").read_text()) == {"a": [1.0, None, [None]]}
    assert os.listdir(tmp_path) == ["table.json"]
