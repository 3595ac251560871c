from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowsteer.cli.main import main


@pytest.mark.parametrize("option", ["demonstrations=0", "steps=0", "episodes=0", "videos=-1", "seed=-1"])
def test_the_demo_refuses_numbers_before_it_starts(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", option, f"out={tmp_path / 'demo'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option.partition('=')[0]} must ")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_collects_trains_and_judges_without_graphics_and_goes_on_where_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("robosuite")
    # In this process: workers would each import everything anew.
    monkeypatch.setattr("flowsteer.cli.collect._workers", lambda config, task: 1)
    monkeypatch.setattr("flowsteer.sim.backends.usable_cores", lambda: 0)
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    options = ["demonstrations=2", "steps=3", "episodes=1", "videos=1", f"out={tmp_path / 'demo'}"]
    with pytest.warns(RuntimeWarning, match=r"no video: cannot render off screen with MUJOCO_GL=vulkan .*: install "):
        assert main(["demo", *options]) == 0
    folder = tmp_path / "demo"
    shown = [Path(line.strip()) for line in capsys.readouterr().out.splitlines() if line.startswith("  /")]
    assert {path.name for path in shown} >= {"first_seed10000.png", "episodes.png", "demo.json"}
    result, judged = (json.loads((folder / name).read_text()) for name in ("demo.json", "judged/eval.json"))
    assert {name: result[name] for name in ("success", "episodes", "versions")} == {
        name: judged[name] for name in ("success", "episodes", "versions")
    }
    assert (result["demonstrations"], result["steps"], result["first_judged_seed"]) == (2, 3, 10_000)
    assert result["failed_seeds"] == ([] if judged["success"]["mean"] == 1 else [10_000])
    assert result["command"].startswith("flowsteer demo demonstrations=2 steps=3 episodes=1 videos=1 out=")
    assert result["wall_s"].keys() == {"collect", "train", "judge"}
    assert all(wall_s > 0 for wall_s in result["wall_s"].values())
    assert result["machine"]["cores"] > 0
    assert result["continued"] is False
    written = (folder / "demonstrations" / "lift.zarr").stat().st_mtime_ns
    monkeypatch.setattr("flowsteer.cli.eval.run", lambda config, folder: 1.0)
    assert main(["demo", *options, "steps=4"]) == 0
    assert (folder / "demonstrations" / "lift.zarr").stat().st_mtime_ns == written
    assert json.loads((folder / "policy" / "last" / "trainer.json").read_text())["step"] == 4
    result = json.loads((folder / "demo.json").read_text())
    assert (result["steps"], result["continued"]) == (4, True), "times of a part are told as such"
