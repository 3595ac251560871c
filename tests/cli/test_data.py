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
