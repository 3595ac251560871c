from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowsteer.cli.main import main
from flowsteer.policies.policy import Policy
from flowsteer.sim.evaluate import Evaluation, evaluate
from flowsteer.sim.vec_env import VecEnv

pytestmark = pytest.mark.usefixtures("short_episodes")


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> str:
    capsys.readouterr()
    assert main(["eval", *args]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The run, to damage."""
    return shutil.copytree(trained, tmp_path / "copied", symlinks=True)


def test_a_run_is_judged_into_its_own_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"checkpoint={trained}", "episodes=3", "seed=7", "eval.videos=0"]) == 0
    result = json.loads((trained / "eval-3x7" / "eval.json").read_text())
    for key in ("success", "return", "max_reward"):
        assert set(result[key]) == {"mean", "low", "high"}
    assert result["episodes"] == 3
    assert result["env_steps"] == sum(row["length"] for row in result["rows"])
    assert set(result["decision_ms"]) == {"p50", "p95"}
    assert [row["seed"] for row in result["rows"]] == [7, 8, 9]
    assert result["versions"]["torch"]
    out = capsys.readouterr().out
    assert "pusht: 3 episodes" in out
    assert str(trained / "eval-3x7") in out


def test_the_result_depends_on_neither_the_batch_nor_the_name_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    rows = []
    for name, checkpoint in (("a", trained / "best"), ("b", next((trained / "checkpoints").iterdir()))):
        options = ["episodes=2", f"sim.num_envs={1 + (name == 'b')}", "eval.videos=0", f"out={tmp_path / name}"]
        assert main(["eval", f"checkpoint={checkpoint}", *options]) == 0
        rows.append(json.loads((tmp_path / name / "eval.json").read_text())["rows"])
    assert rows[0] == rows[1]


def test_another_checkpoint_than_the_last_has_its_name_in_the_folder(trained: Path) -> None:
    assert main(["eval", f"checkpoint={trained / 'best'}", "episodes=1", "eval.videos=1"]) == 0
    folder = trained / "eval-best-1x10000"
    assert (folder / "first_seed10000.mp4").stat().st_size > 1000


def test_the_delay_reaches_the_simulation(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"checkpoint={trained}", "episodes=1", "eval.videos=0", f"out={tmp_path / 'late'}"]
    assert main(["eval", *options, "eval.delay_steps=2"]) == 0
    assert json.loads((tmp_path / "late" / "eval.json").read_text())["delay_steps"] == 2
    message = error_of(capsys, *options, "eval.delay_steps=99", code=1)
    assert message.startswith("delay_steps=99 needs chunks of")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "checkpoint= is missing: name a run folder, RUN/best or RUN/checkpoints/STEP"),
        (["checkpoint=/nowhere"], 1, "checkpoint /nowhere does not exist"),
        (["checkpoint={run}", "episodes=0"], 2, "episodes must be positive, got 0"),
        (["checkpoint={run}", "seed=-2"], 2, "seed must be from 0 to 4294967295, got -2"),
        (["checkpoint={run}", "eval.videos=-1"], 2, "eval.videos must not be negative, got -1"),
        (["checkpoint={run}", "sim.workers=-1"], 1, "workers must be at least 0, got -1"),
        (["checkpoint={run}", "sim.num_envs=0"], 1, "num_envs must be at least 1, got 0"),
        (["checkpoint={run}", "episode=3"], 2, "no option 'episode'; nearest: episodes"),
        (["checkpoint={run}", "task=push"], 2, "task 'push' is unknown; nearest: pusht (known: "),
        (["checkpoint={run}", "task=pusht_keypoints"], 1, "the policy needs observation 'block_pose'"),
        (
            ["checkpoint={run}", "sim.backend=thread"],
            2,
            "sim.backend 'thread' is unknown; nearest: threads (known: gym, ",
        ),
        (["checkpoint={run}", "sim.backend=threads"], 1, "pusht: only MuJoCo tasks run on threads"),
        (["checkpoint={run}", "weights=emma"], 2, "weights 'emma' is unknown; nearest: ema (known: ema, weights)"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], code: int, message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(trained.iterdir())
    told = error_of(capsys, *(option.format(run=trained) for option in options), code=code)
    assert told.startswith(message.format(run=trained)), told
    assert sorted(trained.iterdir()) == before


def test_an_evaluation_that_lost_every_episode_has_failed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(policy: Policy, environments: VecEnv, **options: Any) -> Evaluation:
        result = evaluate(policy, environments, **options)
        return replace(result, episodes=[replace(episode, lost=True) for episode in result.episodes])

    monkeypatch.setattr("flowsteer.cli.simulation.evaluate", lose)
    told = error_of(capsys, f"checkpoint={trained}", "episodes=2", "eval.videos=0", f"out={tmp_path / 'lost'}", code=1)
    assert told.startswith("pusht: all 2 episodes were lost, which tells nothing of the policy")
    result = json.loads((tmp_path / "lost" / "eval.json").read_text())
    assert (result["lost"], result["success"]["mean"]) == (2, None)


def test_a_damaged_checkpoint_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "last" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    told = error_of(capsys, f"checkpoint={copied}", code=1)
    assert told.startswith(f"{file.resolve()} is damaged or not a safetensors file")


def test_a_checkpoint_cannot_make_us_run_its_code(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "last" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for part in ("policy", "task"):
        evil = {**config, part: {"_target_": "os.system", "command": f"touch {copied / 'ran'}"}}
        file.write_text(yaml.safe_dump(evil))
        told = error_of(capsys, f"checkpoint={copied}", code=1)
        assert told.startswith("the config asks to run 'os.system', which is not a building block of flowsteer")
    assert not (copied / "ran").exists()
