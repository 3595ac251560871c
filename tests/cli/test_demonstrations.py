"""What `train` refuses to make of a data set: an option that does nothing, a name that there is not, a leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowsteer.cli.main import main

NO_TASK = ("task=none", "data.control_hz=10")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["sim.backend=thread"],
            2,
            "sim.backend 'thread' is unknown; nearest: threads (known: gym, ray, threads, warp)",
        ),
        (
            ["policy.normalizers={action: minmax}"],
            1,
            "the normaliser of key 'action' 'minmax' is unknown; nearest: min_max (known: identity, mean_std, min_max)",
        ),
        (["~train.lr"], 2, "option 'train.lr' cannot be deleted"),
        (
            ["task=none", "data.observations=[state]", "data.control_hz=0"],
            2,
            "data.control_hz must be positive, got 0.0",
        ),
        (
            ["data.control_hz=5"],
            2,
            "data.control_hz does nothing for task 'pusht', which brings its own: leave it out or set task=none",
        ),
        (
            ["data.observations=[state]"],
            2,
            "data.observations does nothing for task 'pusht', which brings its own: leave it out or set task=none",
        ),
        (
            [*NO_TASK, "data.observations=[state,action]"],
            1,
            "observation 'action' is read from key 'action', which the policy is to predict: "
            "name another key in data.observations or data.names",
        ),
        (
            [*NO_TASK, "data.observations=[state,seen]", "+data.names.seen=action"],
            1,
            "observation 'seen' is read from key 'action', which the policy is to predict: "
            "name another key in data.observations or data.names",
        ),
        (
            [*NO_TASK, "data.observations=[state,state]"],
            1,
            "data.observations names 'state' twice: name it once",
        ),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    options: list[str],
    code: int,
    message: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    assert main(["train", f"dataset={dataset}", f"out={run}", "train.steps=2", *tiny, *options]) == code
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []
