from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowsteer.cli.main import main
from flowsteer.sim.statistics import wilson


def test_experts_are_judged_at_each_noise_and_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robosuite")
    options = ["tasks=[arm_lift,lift]", "episodes=2", "seed=3", "noise={arm_lift: [0.0, 0.5]}", "workers=1"]
    assert main(["bench", "experts", *options, f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "experts.json").read_text())
    rows = {(row["task"], row["noise"]): row for row in result["rows"]}
    assert list(rows) == [("arm_lift", 0.0), ("arm_lift", 0.5), *(("lift", std) for std in (0.0, 0.15, 0.3))]
    assert rows["lift", 0.0]["success"] == rows["arm_lift", 0.0]["success"] == wilson(2, 2)._asdict()
    # Half a radian on every joint is more than any expert can correct.
    assert rows["arm_lift", 0.5]["success"] == wilson(0, 2)._asdict()
    assert rows["arm_lift", 0.5]["env_steps"] == 400
    assert rows["arm_lift", 0.5]["median_steps"] == 200
    assert rows["arm_lift", 0.0]["median_steps"] < 100
    failed = {(told["task"], told["noise"]): told["seeds"] for told in result["failed"]}
    assert failed["arm_lift", 0.5] == [3, 4]
    assert failed["lift", 0.0] == []
    assert result["command"].startswith("flowsteer bench experts 'tasks=[arm_lift,lift]' episodes=2 seed=3 ")
    assert (tmp_path / "experts.png").stat().st_size > 0
    assert "1 (0.342 to 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("tasks=[hopper]", "task with an expert 'hopper' is unknown; nearest: "),
        ("tasks=[]", "tasks is empty: give at least one"),
        ("episodes=0", "episodes must be positive, got 0"),
        ("seed=-1", "seed must be from 0 to "),
        ("noise.lift=[0.1,-0.1]", "noise.lift must not be negative, got -0.1"),
        ("noise.can=[]", "noise.can is empty: give at least one"),
        ("noise.hopper=[0.1]", "noise.hopper"),
        ("correlation=1", "std must be positive or 0, correlation and pause_probability in [0, 1), got "),
        ("workers=-1", "workers must not be negative, got -1"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "experts", option, f"out={tmp_path / 'out'}"]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
