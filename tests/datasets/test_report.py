from __future__ import annotations

import io

import imageio.v3 as iio
import numpy as np
import pytest
from rich.console import Console

from flowsteer.datasets import DataError, ReplayBuffer, inspect, plot, render, write_robomimic, write_zarr
from flowsteer.datasets.report import channel_report, noop_share
from flowsteer.datasets.report_table import print_report


def test_a_channel_by_hand():
    # Median 2, absolute deviations 1 0 1 1 98 1, their median 1: outliers lie beyond 6 x 1.4826.
    channel = channel_report("x", np.array([1.0, 2.0, 3.0, 1.0, 100.0, 3.0]))
    assert (channel.low, channel.high, channel.mean) == (1, 100, pytest.approx(110 / 6))
    assert (channel.outliers, channel.first_outlier, channel.constant) == (1, 4, False)


def test_bad_and_constant_channels():
    bad = channel_report("x", np.array([1.0, np.nan, 3.0, np.inf]))
    assert (bad.non_finite, bad.low, bad.high) == (2, 1, 3)
    nothing = channel_report("x", np.full(3, np.nan))
    assert (nothing.non_finite, nothing.constant) == (3, False)
    assert channel_report("x", np.full(3, 7.0)).constant
    gripper = channel_report("x", np.array([-1.0] * 90 + [1.0] * 10))
    assert not gripper.has_outliers


def test_outliers_are_few():
    few, many = np.random.default_rng(0).normal(size=(2, 1000))
    few[:3], many[:200] = 50, 50
    assert channel_report("x", few).has_outliers
    assert not channel_report("x", many).has_outliers


def test_no_op_steps_by_hand():
    # Frame 0 is zero, frame 2 repeats frame 1, frame 3 starts an episode and may equal frame 2.
    actions = np.array([[0.0, 0], [1, 2], [1, 2], [1, 2], [1, 3]])
    assert noop_share(actions, np.array([3, 5])) == pytest.approx(2 / 5)


@pytest.fixture
def spoiled(make_buffer, tmp_path):
    buffer = make_buffer((40, 60), images=True, control_hz=20, names={"state": ["x", "y"]})
    buffer.data["state"][7, 0] = np.nan
    buffer.data["goal"] = np.full((100, 1), 3.0)
    buffer.data["force"] = np.random.default_rng(0).normal(size=100)
    buffer.data["force"][33] = 99
    return write_zarr(buffer, tmp_path / "demo.zarr")


def test_a_report_of_spoiled_data(spoiled):
    report = inspect(spoiled)
    assert report.lengths.tolist() == [40, 60]
    assert report.duration_s == 5
    assert report.problem is None
    keys = {key.key: key for key in report.keys}
    assert [channel.name for channel in keys["state"].channels] == ["x", "y"]
    assert keys["state"].channels[0].non_finite == 1
    assert keys["goal"].channels[0].constant
    assert keys["force"].channels[0].first_outlier == 33
    assert keys["img"].first_frame.shape == (12, 10, 3)
    assert keys["img"].channels == ()


def test_the_tables_tell_it(spoiled):
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(inspect(spoiled), console)
    text = console.export_text()
    for wanted in (
        "2, 100 frames",
        "40 to 60, median 50",
        "20 Hz, 5 s in all",
        "12x10x3",
        "x (1)",
        "0 (3)",
        "at frame 33",
    ):
        assert wanted in text
    assert render(inspect(spoiled)).renderables


def test_the_picture_is_drawn_and_replaced(spoiled, tmp_path):
    path = plot(inspect(spoiled), tmp_path / "out/report.png")
    first = iio.imread(path)
    assert first.shape[0] > 600
    assert first.std() > 10
    plot(inspect(spoiled), path)
    assert [child.name for child in path.parent.iterdir()] == ["report.png"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(spoiled, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path = tmp_path / "out/report.png"
    path.parent.mkdir()
    path.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(DataError, match=r"report.png: cannot be written \(No space left on device\)"):
        plot(inspect(spoiled), path)
    assert [(child.name, child.read_bytes()) for child in path.parent.iterdir()] == [("report.png", b"old")]


def test_a_folder_is_never_replaced_by_a_picture(spoiled, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out: already exists"):
        plot(inspect(spoiled), tmp_path / "out")


def test_data_without_images_or_actions(tmp_path):
    write_zarr(ReplayBuffer({"state": np.zeros((5, 2))}, np.array([5])), tmp_path / "d.zarr")
    report = inspect(tmp_path / "d.zarr")
    assert report.noop_share is None
    assert plot(report, tmp_path / "d.png").is_file()


def test_structural_problems_are_reported_or_refused(make_buffer, tmp_path):
    path = write_zarr(make_buffer(), tmp_path / "d.zarr")
    (path / "data/action/c/0/0").unlink()
    assert "1 of its chunks are missing" in inspect(path).problem
    file = write_robomimic(make_buffer(), tmp_path / "d.hdf5")
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DataError, match="truncated"):
        inspect(file)
