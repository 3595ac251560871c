from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from flowsteer.cli.main import main
from flowsteer.datasets.opening import open_dataset


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> str:
    capsys.readouterr()
    assert main(["data", *args]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_inspect_prints_and_plots(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(dataset)]) == 0
    out = capsys.readouterr().out
    assert "6, 120 frames" in out
    assert "picture: push.zarr.inspect.png" in out
    assert (here / "push.zarr.inspect.png").is_file()
    assert main(["data", "inspect", str(dataset), "--plot", "look.png"]) == 0
    assert (here / "look.png").is_file()


def test_convert_goes_by_the_name_and_back(dataset: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", str(dataset), "a.hdf5"]) == 0
    assert main(["data", "convert", "a.hdf5", "b.zarr"]) == 0
    first, last = open_dataset(dataset), open_dataset(here / "b.zarr")
    assert last.episode_ends.tolist() == first.episode_ends.tolist()
    np.testing.assert_allclose(last.data["action"], first.data["action"])
    told = error_of(capsys, "convert", str(dataset), "a.hdf5", code=1)
    assert told.startswith("a.hdf5: already exists")
    assert error_of(capsys, "convert", str(dataset), "a.csv", code=1).startswith("a.csv: cannot tell the format")
    assert sorted(os.listdir(here)) == ["a.hdf5", "b.zarr"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "flowsteer data needs a command: inspect, convert, collect, fetch; see flowsteer data --help"),
        (["inspekt"], 2, "command 'inspekt' is unknown; nearest: inspect"),
        (["inspect"], 2, "the following arguments are required: path; see flowsteer data inspect --help"),
        (["inspect", "nowhere"], 1, "nowhere: no such file or folder"),
        (["fetch", "pushd"], 1, "public data sets: there is no key 'pushd': did you mean 'pusht'?"),
        (["collect"], 2, "task= is missing; tasks that have a scripted expert: lift, can"),
        (["collect", "task=hopper"], 2, "task 'hopper' has no scripted expert; tasks that have: lift, can"),
        (["collect", "task=lift", "format=csv"], 2, "format 'csv' is unknown; nearest: zarr (known: hdf5, zarr)"),
        (["collect", "task=lift", "noise.std=-1"], 1, "std must be positive or 0"),
        (["collect", "task=lift", "episodes=0"], 2, "episodes must be positive, got 0"),
        (["collect", "task=lift", "seed=-1"], 2, "seed must be from 0 to 4294967295, got -1"),
        (["collect", "task=lift", "sim.workers=-1"], 2, "sim.workers must not be negative, got -1"),
        (["collect", "task=lift", "sim.num_envs=3"], 2, "sim.num_envs does nothing for a scripted expert, whose epis"),
        (["collect", "task=lift", "sim.backend=gym"], 2, "sim.backend does nothing for a scripted expert"),
        (["collect", "checkpoint=x", "noise.std=0.1"], 2, "noise.std does nothing for a checkpoint, whose own actions"),
        (["collect", "checkpoint=x", "record_clean=false"], 2, "record_clean does nothing for a checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], code: int, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, *args, code=code).startswith(message)
    assert os.listdir(here) == []


CAMERA = "observation.images.front"


@pytest.fixture
def filmed(here: Path) -> Path:
    """A LeRobot data set of one episode whose film is none."""
    pa = pytest.importorskip("pyarrow", reason="needs the lerobot extra")
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the lerobot extra")
    folder, frames = here / "filmed", 20
    for name in ("meta", "data/chunk-000", f"videos/chunk-000/{CAMERA}"):
        (folder / name).mkdir(parents=True)
    camera = {"dtype": "video", "shape": [48, 64, 3]}
    info = {"codebase_version": "v2.1", "fps": 10, "total_frames": frames, "features": {CAMERA: camera}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "length": frames}))
    rows = {"action": [[0.0]] * frames, "timestamp": np.arange(frames) / 10, "episode_index": [0] * frames}
    pq.write_table(pa.table(rows), folder / "data/chunk-000/episode_000000.parquet")
    (folder / f"videos/chunk-000/{CAMERA}/episode_000000.mp4").write_bytes(b"no film")
    return folder


def test_an_unreadable_video_is_refused_by_name(filmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = error_of(capsys, "convert", str(filmed), "deep/a.zarr", code=1)
    film = filmed / "videos" / "chunk-000" / CAMERA / "episode_000000.mp4"
    assert told.startswith(f"{film}: the video cannot be read ("), told
    options = ["task=none", f"data.observations=[{CAMERA}]", "encoder=image", "train.steps=2", "device=cpu", "out=run"]
    assert main(["train", f"dataset={filmed}", *options]) == 1
    assert capsys.readouterr().err == f"error: {told}\n"
    assert os.listdir(filmed.parent) == ["filmed"]


def test_a_rate_of_0_is_refused_by_name(filmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = filmed / "meta" / "info.json"
    file.write_text(file.read_text().replace('"fps": 10', '"fps": 0'))
    for args in (["inspect", str(filmed)], ["convert", str(filmed), "a.zarr"]):
        assert error_of(capsys, *args, code=1).startswith(f"{file}: key 'fps' must be a positive number, got 0: ")
    assert os.listdir(filmed.parent) == ["filmed"]


def test_not_a_number_is_seen_and_not_converted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    action = np.zeros((20, 2))
    action[13, 1] = np.nan
    np.savez(here / "d.npz", actions=action, episode_ends=np.array([20]))
    told = error_of(capsys, "convert", "d.npz", "a.zarr", code=1)
    assert told.startswith("d.npz: key 'action' holds a NaN or infinite value at frame 13 (episode 0)"), told
    assert os.listdir(here) == ["d.npz"]
    assert main(["data", "inspect", "d.npz"]) == 0
    assert "NaN" in capsys.readouterr().out


def test_an_expert_is_collected(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robosuite")
    options = ["task=lift", "episodes=2", "seed=3", "sim.workers=1", "noise.std=0.1"]
    assert main(["data", "collect", *options, "out=two"]) == 0
    assert capsys.readouterr().out == f"{here / 'two' / 'lift.zarr'}: 2 episodes\n"
    buffer = open_dataset(here / "two" / "lift.zarr")
    assert buffer.num_episodes == 2
    assert buffer.meta["episodes"]["success"] == [True, True]
    assert error_of(capsys, "collect", *options, "out=two", code=2).startswith(str(here / "two" / "lift.zarr"))


def test_a_checkpoint_is_collected(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"checkpoint={trained}", "episodes=2", "out=two"]
    assert error_of(capsys, "collect", *options, code=2).startswith("none of 2 episodes succeeded: ")
    assert os.listdir(here) == []
    assert main(["data", "collect", *options, "only_successful=false", "format=hdf5"]) == 0
    buffer = open_dataset(here / "two" / "pusht.hdf5")
    assert buffer.num_episodes == 2
    judged = ["eval", f"checkpoint={trained}", "episodes=2", "seed=0", "eval.videos=0", "out=judged"]
    assert main(judged) == 0
    rows = json.loads((here / "judged" / "eval.json").read_text())["rows"]
    assert buffer.episode_lengths.tolist() == [row["length"] for row in rows]
