from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowsteer.cli.main import main


@pytest.fixture(scope="module")
def descending(dataset: Path, tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gym_pusht")
    folder = tmp_path_factory.mktemp("runs") / "descending"
    options = ("policy=ebt", "network=mlp", "train.steps=2", "policy.tolerance=0.3")
    assert main(["train", f"dataset={dataset}", f"out={folder}", *tiny, *options]) == 0
    return folder


def test_each_number_of_steps_is_judged_and_plotted(descending: Path, tmp_path: Path) -> None:
    options = ["steps=[1,3]", "tolerance=0", "episodes=1", "device=cpu", "sim.workers=0", f"out={tmp_path}"]
    assert main(["bench", "descent", f"runs=[{descending}]", *options]) == 0
    result = json.loads((tmp_path / "descent.json").read_text())
    assert [(row["most_steps"], row["mean_steps"]) for row in result["rows"]] == [(1, 1.0), (3, 3.0)]
    assert all(row["max_reward"].keys() == {"mean", "low", "high"} for row in result["rows"])
    assert (tmp_path / "descent.png").stat().st_size > 5_000


def test_rows_that_rest_are_counted_no_longer(descending: Path, tmp_path: Path) -> None:
    options = ["steps=[4]", "tolerance=1000", "episodes=1", "device=cpu", "sim.workers=0", f"out={tmp_path}"]
    assert main(["bench", "descent", f"runs=[{descending}]", *options]) == 0
    (row,) = json.loads((tmp_path / "descent.json").read_text())["rows"]
    assert row["mean_steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "runs= is missing: name run folders"),
        (["runs=[{run}]"], "{run} holds FlowPolicy, which descends no energy: give runs of policy=ebt"),
        (["runs=[{run}]", "steps=[0]"], "steps must be positive, got 0"),
        (["runs=[{run}]", "tolerance=-1"], "tolerance must not be negative, got -1"),
    ],
)
def test_bad_input_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    capsys.readouterr()
    filled = [option.format(run=trained) for option in options]
    assert main(["bench", "descent", *filled, f"out={tmp_path / 'out'}"]) != 0
    told = capsys.readouterr().err.removeprefix("error: ")
    assert told.startswith(message.format(run=trained)), told
    assert not (tmp_path / "out").exists()
