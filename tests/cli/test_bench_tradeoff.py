"""Evaluations by what they cost: hand-made run folders in, hand-computed rows out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flowsteer.cli.main import main
from flowsteer.policies.spec import ArraySpec, PolicySpec


def make_run(folder: Path, seed: int, policy: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "policy.safetensors").write_bytes(b"")
    spec = PolicySpec({"state": ArraySpec((3,))}, 2, 2, 8, 4, 10.0).to_dict()
    (folder / "config.yaml").write_text(yaml.safe_dump({"format": 1, "seed": seed, "policy": policy, "spec": spec}))
    return folder


def judge(
    run: Path, name: str, score: float, execution: str, evaluations: float | None, execution_steps: int = 4
) -> None:
    interval = {"mean": score, "low": 0.0, "high": 1.0}
    result = {
        "task": "pusht",
        "episodes": 5,
        "execution": execution,
        "execution_options": {},
        "execution_steps": execution_steps,
        "network_evaluations": evaluations,
        **dict.fromkeys(("success", "max_reward", "return"), interval),
    }
    (run / name).mkdir()
    (run / name / "eval.json").write_text(json.dumps(result))


def bench(out: Path, runs: list[Path], *options: str) -> int:
    return main(["bench", "tradeoff", f"runs=[{','.join(map(str, runs))}]", f"out={out}", *options])


def test_evaluations_are_grouped_by_policy_and_execution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = {"_target_": "flowsteer.policies.x.FlowPolicy", "steps": 10}
    runs = [make_run(tmp_path / f"run{seed}", seed, flow) for seed in (0, 1)]
    for run, sync, rti, evaluations in ((runs[0], 0.8, 0.6, 1.5), (runs[1], 0.9, 0.7, 2.5)):
        judge(run, "sync", sync, "sync", 10.0)
        judge(run, "rti", rti, "rti", evaluations)
    judge(runs[0], "often", 1.0, "rti", 1.0, execution_steps=1)
    students = [
        make_run(
            tmp_path / path,
            0,
            {
                "_target_": "flowsteer.policies.x.ConsistencyPolicy",
                "steps": 1,
                "path": {"_target_": f"flowsteer.policies.paths.{path}"},
            },
        )
        for path in ("LinearPath", "VariancePreservingPath")
    ]
    for student in students:
        judge(student, "sync", 0.5, "sync", 1.0)
    assert bench(tmp_path / "out", [*runs, *students], "judged=[sync,rti,often]", "name=fast") == 0
    result = json.loads((tmp_path / "out" / "fast.json").read_text())
    assert [(row["policy"], row["execution"], row["execution_steps"], row["seeds"]) for row in result["rows"]] == [
        ("FlowPolicy", "sync", 4, 2),
        ("FlowPolicy", "rti", 4, 2),
        ("FlowPolicy", "rti", 1, 1),
        ("ConsistencyPolicy, LinearPath", "sync", 4, 1),
        ("ConsistencyPolicy, VariancePreservingPath", "sync", 4, 1),
    ]
    warm = result["rows"][1]
    assert warm["network_evaluations"] == 2.0
    assert warm["max_reward"] == pytest.approx({"mean": 0.65, "lowest": 0.6, "highest": 0.7})
    assert len(result["runs"]) == 7
    assert (tmp_path / "out" / "fast.png").stat().st_size > 0
    assert "0.65 (0.6 to 0.7)" in capsys.readouterr().out


def test_policies_of_different_steps_are_different_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / f"run{k}", 0, {"_target_": "flowsteer.x.FlowPolicy", "steps": k}) for k in (1, 4)]
    for run in runs:
        judge(run, "eval-100x10000", 0.5, "sync", 1.0)
    assert bench(tmp_path / "out", runs) == 0
    rows = json.loads((tmp_path / "out" / "tradeoff.json").read_text())["rows"]
    assert [row["policy_steps"] for row in rows] == [1, 4]
    assert "(" not in capsys.readouterr().out, "of one seed there is no spread"


def test_two_settings_of_one_run_are_no_two_seeds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, {"_target_": "flowsteer.x.FlowPolicy", "steps": 10})
    names = [f"rti{n}" for n in range(12)]
    for name in names:
        judge(run, name, 0.5, "rti", 1.0, execution_steps=int(name[3:]))
    judge(run, "other", 0.25, "rti", 2.0, execution_steps=0)
    assert bench(tmp_path / "out", [run], f"judged=[{','.join(names)},other]") == 0
    rows = json.loads((tmp_path / "out" / "tradeoff.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == 13 * [1]


def test_a_run_that_nobody_judged_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 0, {"_target_": "flowsteer.policies.x.FlowPolicy"})
    assert bench(tmp_path / "out", [run], "judged=[sync,rti]") == 2
    assert f"{run} holds none of sync, rti: make one with flowsteer eval checkpoint={run}" in capsys.readouterr().err
    gaussian = make_run(tmp_path / "gaussian", 0, {"_target_": "flowsteer.policies.x.GaussianPolicy"})
    judge(gaussian, "sync", 0.5, "sync", None)
    assert bench(tmp_path / "out", [gaussian], "judged=[sync]") == 2
    assert f"{gaussian} holds GaussianPolicy, which runs no network K times: leave" in capsys.readouterr().err
    assert bench(tmp_path / "out", []) == 2
    assert "runs= is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
