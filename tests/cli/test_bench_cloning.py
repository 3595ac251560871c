"""Judged runs in one table: hand-made run folders in, hand-computed rows out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flowsteer.cli.main import main
from flowsteer.policies.spec import ArraySpec, PolicySpec


def make_run(folder: Path, seed: int, success: float, judged: bool = True) -> Path:
    folder.mkdir()
    (folder / "policy.safetensors").write_bytes(b"")
    config = {
        "format": 1,
        "seed": seed,
        "train": {"steps": 20},
        "policy": {"_target_": "flowsteer.policies.x.FlowPolicy"},
        "spec": PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0).to_dict(),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    scores = {"eval/success": 0.25, "eval/max_reward": 0.5, "eval/return": 7.0}
    rows = [{"step": 10, "train/loss": 1.0, "train/train_s": 60.0}, {"step": 10, **scores}]
    rows.append({"step": 20, "train/loss": 0.5, "train/train_s": 120.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {"mean": success, "low": 0.0, "high": 1.0}
    result = {"task": "pusht", "episodes": 5, "decision_ms": {"p50": 1.0, "p95": 2.0}}
    if judged:
        (folder / "eval-5x0").mkdir()
        scores_of = {"success": interval, "max_reward": interval, "return": interval}
        (folder / "eval-5x0" / "eval.json").write_text(json.dumps({**result, **scores_of}))
    return folder


def test_seeds_are_summarised_by_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / f"run{seed}", seed, success) for seed, success in ((0, 0.2), (1, 0.6))]
    chosen = f"runs=[{runs[0]},{runs[1]}]"
    assert main(["bench", "cloning", chosen, "judged=eval-5x0", "name=push", f"out={tmp_path / 'out'}"]) == 0
    result = json.loads((tmp_path / "out" / "push.json").read_text())
    (row,) = result["rows"]
    assert row["policy"] == "FlowPolicy"
    assert row["seeds"] == 2
    assert row["minutes"] == 2.0
    assert row["success"] == pytest.approx({"mean": 0.4, "lowest": 0.2, "highest": 0.6})
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    (point,) = result["runs"][0]["curve"]
    assert point == {"step": 10, "train_minutes": 1.0, "max_reward": 0.5, "success": 0.25, "return": 7.0}
    assert result["command"].startswith(f"flowsteer bench cloning '{chosen}' judged=eval-5x0 name=push out=")
    assert (tmp_path / "out" / "push.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert "FlowPolicy" in out
    assert "0.4 (0.2 to 0.6)" in out


def test_a_run_that_nobody_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 0, 0.5, judged=False)
    assert main(["bench", "cloning", f"runs=[{run}]", "judged=eval-5x0", f"out={tmp_path / 'out'}"]) != 0
    message = capsys.readouterr().err
    assert f"eval-5x0/eval.json is missing: make it with flowsteer eval checkpoint={run}" in message
    assert not (tmp_path / "out").exists()


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cloning", f"out={tmp_path / 'out'}"]) != 0
    assert "runs= is missing: name run folders" in capsys.readouterr().err
