"""Bars and lines, in a time that the test winds forward."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console

from flowsteer.datasets import ReplayBuffer, open_dataset, progress, write_zarr
from flowsteer.datasets.progress import ProgressBar, format_duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_off_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end(clock, capsys):
    with ProgressBar("rolling", 40, "episodes") as bar:
        for _ in range(20):
            clock[0] += 1.5
            bar.advance(2, "2 tried")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "rolling 14/40 episodes  2 tried  1.3 episodes/s  0:20 left",
        "rolling 28/40 episodes  2 tried  1.3 episodes/s  0:09 left",
        "rolling 40/40 episodes  2 tried  1.3 episodes/s  0:00 left",
    ]


def test_a_short_job_leaves_no_line(clock, capsys):
    with ProgressBar("reading", 2, "frames") as bar:
        bar.advance()
        clock[0] += 9.9
        bar.advance()
    assert capsys.readouterr().err == ""


def test_what_was_done_before_is_no_part_of_the_rate(clock, capsys):
    with ProgressBar("step", 1000, "steps", start=100, first_line_s=0) as bar:
        clock[0] += 4
        bar.move(102)
    assert capsys.readouterr().err == "step 102/1000 steps  0.500 steps/s  29:56 left\n"


def test_an_unknown_total_has_no_time_left(clock, capsys):
    with ProgressBar("a.zip", None, "MB", first_line_s=0) as bar:
        clock[0] += 2
        bar.advance(7.5)
    assert capsys.readouterr().err == "a.zip 8 MB  3.8 MB/s\n"


def test_on_a_terminal_bars_share_one_display_and_leave_only_what_is_kept(clock):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, soft_wrap=True, _environ={})
    with ProgressBar("step", 10, "steps", console=terminal) as outer:
        outer.move(5, "loss 0.5")
        with ProgressBar("judging [a]", 4, "episodes") as inner:
            clock[0] += 2
            inner.move(1)
            inner._display.refresh()
            drawn = screen.getvalue()
        outer.move(6, "success 1 [0, 1]", keep=True)
    assert "5/10 steps  loss 0.5" in drawn
    assert "judging [a]" in drawn
    assert "1/4 episodes  0.500 episodes/s  0:06 left" in drawn
    assert "step 6/10 steps  success 1 [0, 1]  3.0 steps/s  0:01 left\n" in screen.getvalue()
    assert progress._running == []


def test_reading_tells_its_frames(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(
        ProgressBar.__init__, "__kwdefaults__", {**ProgressBar.__init__.__kwdefaults__, "first_line_s": 0}
    )
    path = write_zarr(ReplayBuffer({"action": np.zeros((20, 2))}, np.array([20])), tmp_path / "a.zarr")
    open_dataset(path)
    assert f"reading {path}: key 'action' 20/20 frames  " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01"), (math.inf, "?")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
