"""Fine-tuned runs in one table: hand-made run folders in, hand-computed rows out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flowsteer.cli.main import main
from flowsteer.policies.spec import ArraySpec, PolicySpec

SPEC = PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0).to_dict()
FLOW = {"_target_": "flowsteer.policies.x.FlowPolicy"}


def judge(folder: Path, success: float) -> None:
    scores = {name: {"mean": success, "low": 0.0, "high": 1.0} for name in ("success", "max_reward")}
    scores["return"] = {"mean": 100 * success, "low": 0.0, "high": 100.0}
    (folder / "eval-5x0").mkdir()
    (folder / "eval-5x0" / "eval.json").write_text(json.dumps({"task": "arm_lift", "episodes": 5, **scores}))


def make_run(folder: Path, seed: int, success: float, start: Path | None, lr: float = 0.1) -> Path:
    folder.mkdir()
    (folder / "policy.safetensors").write_bytes(b"")
    options = {
        "seed": seed,
        "checkpoint": start and str(start),
        "algo": {"_target_": "flowsteer.rl_finetune.dppo.DPPO", "clip": 0.01},
        "train": {"lr": lr},
    }
    config = {"format": 1, "policy": FLOW, "cloned_policy": FLOW, "spec": SPEC, "finetune": options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    times = {"time/collect_s": 40.0, "time/update_s": 20.0}
    scores = {"eval/success": 0.25, "eval/max_reward": 0.5, "eval/return": 7.0}
    rows = [{"step": 0, **scores}, {"step": 500, **times}, {"step": 900 + seed * 200, **times}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge(folder, success)
    return folder


def bench(out: Path, *options: str) -> int:
    return main(["bench", "finetune", "judged=eval-5x0", f"out={out}", *options])


def test_runs_are_summarised_beside_what_they_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    judge(base, 0.3)
    runs = [make_run(tmp_path / f"run{seed}", seed, success, base) for seed, success in ((0, 0.8), (1, 1.0))]
    runs.append(make_run(tmp_path / "fresh", 0, 0.5, None))
    chosen = ",".join(map(str, runs))
    assert bench(tmp_path / "out", f"runs=[{chosen}]", "name=arm") == 0
    result = json.loads((tmp_path / "out" / "arm.json").read_text())
    tuned, fresh = result["rows"]
    assert (tuned["algo"], tuned["policy"], tuned["seeds"]) == ("DPPO", "FlowPolicy", 2)
    assert tuned["before"] == 0.3
    assert tuned["success"] == pytest.approx({"mean": 0.9, "lowest": 0.8, "highest": 1.0})
    assert tuned["env_steps"] == 1000
    assert tuned["minutes"] == 2.0
    assert fresh["before"] is None
    first = result["runs"][0]
    # No path of this machine.
    assert first["start"] == "base"
    assert first["curve"] == [{"env_steps": 0, "success": 0.25, "max_reward": 0.5, "return": 7.0}]
    assert (tmp_path / "out" / "arm.png").stat().st_size > 0
    assert "DPPO" in capsys.readouterr().out


def test_a_result_keeps_how_each_run_learnt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, 0.8, None)
    assert bench(tmp_path / "out", f"runs=[{run}]") == 0
    (row,) = json.loads((tmp_path / "out" / "finetune.json").read_text())["runs"]
    assert row["options"] == {"algo.clip": 0.01, "train.lr": 0.1}


def test_runs_of_an_earlier_result_join(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / f"run{seed}", seed, success, None) for seed, success in ((0, 0.3), (1, 0.6)))
    assert bench(tmp_path / "out", f"runs=[{first},{second}]", "name=before") == 0
    before = tmp_path / "out" / "before.json"
    third = make_run(tmp_path / "run2", 2, 0.9, None)
    assert bench(tmp_path / "out", f"runs=[{third}]", f"earlier=[{before}]") == 0
    result = json.loads((tmp_path / "out" / "finetune.json").read_text())
    (row,) = result["rows"]
    assert row["seeds"] == 3
    assert row["success"] == pytest.approx({"mean": 0.6, "lowest": 0.3, "highest": 0.9})
    (origin,) = result["earlier"]
    assert origin.keys() == {"command", "machine", "versions"}
    assert "name=before" in origin["command"]
    assert bench(tmp_path / "out", f"earlier=[{before}]", "score=return", "name=again") == 0
    (row,) = json.loads((tmp_path / "out" / "again.json").read_text())["rows"]
    assert row["return"]["mean"] == pytest.approx(45.0)


def test_a_recorded_run_is_not_replaced_by_another_of_its_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", 0, 0.2, None)
    assert bench(tmp_path / "out", f"runs=[{run}]", "name=before") == 0
    assert bench(tmp_path / "out", f"runs=[{run}]", f"earlier=[{tmp_path / 'out' / 'before.json'}]") == 2
    assert "seeds 0 and 0 of arm_lift: DPPO, FlowPolicy are one seed: gather the runs apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("env_steps", 2_000_000, "million env steps (2.0 and 0.0)"), ("episodes", 100, "episodes (100 and 5)")],
)
def test_recorded_runs_without_options_are_compared_by_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: int, reason: str
) -> None:
    run = make_run(tmp_path / "run", 1, 0.2, None)
    assert bench(tmp_path / "out", f"runs=[{make_run(tmp_path / 'old', 0, 0.2, None)}]", "name=before") == 0
    before = tmp_path / "out" / "before.json"
    result = json.loads(before.read_text())
    del result["runs"][0]["options"]
    result["runs"][0][name] = value
    before.write_text(json.dumps(result))
    assert bench(tmp_path / "out", f"runs=[{run}]", f"earlier=[{before}]") == 2
    assert f"differ in {reason}: gather the runs apart" in capsys.readouterr().err


def test_what_is_no_earlier_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 0, 0.8, None)
    for name, text in (("text.json", "no json"), ("list.json", "[]"), ("other.json", '{"rows": []}')):
        (tmp_path / name).write_text(text)
        assert bench(tmp_path / "out", f"runs=[{run}]", f"earlier=[{tmp_path / name}]") == 2
        assert f"{name} is no result of gathered runs" in capsys.readouterr().err
    assert bench(tmp_path / "out", f"runs=[{run}]", f"earlier=[{tmp_path / 'none.json'}]") == 1
    assert "none.json: No such file" in capsys.readouterr().err


def test_a_seed_that_is_there_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / f"run{number}", 0, 0.8, None, lr=0.1 + number) for number in (0, 1)]
    assert bench(tmp_path / "out", f"runs=[{runs[0]},{runs[1]}]") == 2
    assert "seeds 0 and 0 of arm_lift: DPPO, FlowPolicy are one seed: gather the runs apart" in capsys.readouterr().err


def test_runs_that_learn_in_different_ways_are_no_seeds_of_one_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / f"run{seed}", seed, 0.8, None, lr=0.1 + seed) for seed in (0, 1)]
    assert bench(tmp_path / "out", f"runs=[{runs[0]},{runs[1]}]") == 2
    assert (
        "seeds 0 and 1 of arm_lift: DPPO, FlowPolicy differ in train.lr (0.1 and 1.1): gather the runs apart"
        in capsys.readouterr().err
    )


def test_another_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, 0.8, None)
    assert bench(tmp_path / "out", f"runs=[{run}]", "score=return") == 0
    (row,) = json.loads((tmp_path / "out" / "finetune.json").read_text())["rows"]
    assert row["return"]["mean"] == pytest.approx(80.0)


def test_what_cannot_be_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    run = make_run(tmp_path / "run", 0, 0.8, base)
    assert bench(tmp_path / "out", f"runs=[{run}]", "score=sucess") == 2
    assert "score 'sucess' is unknown; nearest: success" in capsys.readouterr().err
    assert bench(tmp_path / "out", f"runs=[{run}]") == 2
    remedy = f"make it with flowsteer eval checkpoint={base} episodes=5 seed=0"
    assert remedy in capsys.readouterr().err
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k != "cloned_policy"}))
    assert bench(tmp_path / "out", f"runs=[{run}]") == 2
    assert f"{run} is not a run of flowsteer finetune" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
