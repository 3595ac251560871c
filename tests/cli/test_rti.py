from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowsteer.cli.main import main
from flowsteer.cli.rti import choose

QUICK = ("episodes=1", "starts=[0.5]", "steps=[1]", "tolerance=1", "device=cpu", "sim.workers=0")
"""Any choice is good enough."""


def error_of(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> str:
    capsys.readouterr()
    assert main(list(args)) == code
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1, captured.err
    return captured.err.partition("error: ")[2].rstrip("\n")


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with a choice for its own Ta = 8 and one for Ta = 1."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("tuned") / "run", symlinks=True)
    assert main(["rti", f"checkpoint={run}", *QUICK, "starts=[1.0]", "renoise=[true,false]"]) == 0
    assert main(["rti", f"checkpoint={run}", *QUICK, "horizon.execution_steps=1"]) == 0
    return run


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "copied", symlinks=True)


def stored(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((run / "last" / "config.yaml").read_text())
    return config


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return result


def test_the_table_has_a_row_for_the_policy_and_one_for_each_combination(tuned: Path) -> None:
    result = json.loads((tuned / "rti-1x2000000" / "rti.json").read_text())
    reference, *rows = result["rows"]
    assert (reference["execution"], reference["start"], reference["steps"], reference["contraction"]) == (
        ("sync", None, 10, None)
    )
    assert reference["evaluations"] == 10
    assert [(row["start"], row["renoise"]) for row in rows] == [(1.0, True), (1.0, False)]
    for row in rows:
        assert row["success"].keys() == row["max_reward"].keys() == {"mean", "low", "high"}
        # The first of 38 decisions takes 10 evaluations, the others one.
        assert row["evaluations"] == pytest.approx((10 + 37) / 38)
        assert row["seam_share"] == pytest.approx(row["seam"] / 512, rel=0.5)
    assert rows[0]["contraction"] == 0, "of noise nothing of the guess is left"
    assert rows[1]["contraction"] > 0.01
    assert result["chosen"]["jump"] > 0
    assert result["execution_steps"] == 8
    assert (tuned / "rti-1x2000000" / "rti.png").stat().st_size > 10_000


def test_the_choice_is_in_the_checkpoint_for_its_ta(tuned: Path, trained: Path) -> None:
    config = stored(tuned)
    assert config["rti"].keys() == {8, 1}
    assert config["rti"][8] == json.loads((tuned / "rti-1x2000000" / "rti.json").read_text())["chosen"]
    assert list(config)[-1] == "spec"
    assert {key: value for key, value in config.items() if key != "rti"} == stored(trained)


@pytest.mark.parametrize(
    ("options", "folder", "execution_steps"),
    [([], "eval-rti-1x7", 8), (["horizon.execution_steps=1"], "eval-rti-ta1-1x7", 1)],
)
def test_eval_takes_the_choice(tuned: Path, options: list[str], folder: str, execution_steps: int) -> None:
    options = ["execution=rti", "episodes=1", "seed=7", "eval.videos=0", *options]
    assert main(["eval", f"checkpoint={tuned}", *options]) == 0
    result = result_of(tuned / folder)
    assert (result["execution"], result["execution_steps"]) == ("rti", execution_steps)
    assert result["execution_options"] == stored(tuned)["rti"][execution_steps]
    decisions = -(-300 // execution_steps)
    refreshes = -(-decisions // 50)
    assert result["network_evaluations"] == pytest.approx((decisions + 9 * refreshes) / decisions)


def test_eval_takes_options_instead(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["execution=rti", "rti.start=1.0", "rti.steps=5", "episodes=1", "eval.videos=0", f"out={tmp_path}"]
    assert main(["eval", f"checkpoint={trained}", *options]) == 0
    result = result_of(tmp_path)
    assert (result["execution_options"]["start"], result["execution_options"]["steps"]) == (1.0, 5)
    assert result["network_evaluations"] == pytest.approx((10 + 37 * 5) / 38)
    assert "of the network, execution=rti" in capsys.readouterr().out


def test_results_with_options_have_a_folder_of_their_own(tuned: Path) -> None:
    options = ["execution=rti", "rti.start=0.5", "rti.renoise=false", "episodes=1", "seed=7", "eval.videos=0"]
    assert main(["eval", f"checkpoint={tuned}", *options]) == 0
    result = result_of(tuned / "eval-rti-start0.5-renoisefalse-1x7")
    assert (result["execution_options"]["start"], result["execution_options"]["renoise"]) == (0.5, False)


def test_a_plain_evaluation_says_so(trained: Path, tmp_path: Path) -> None:
    options = ["episodes=1", "eval.videos=0", "horizon.execution_steps=4", f"out={tmp_path}"]
    assert main(["eval", f"checkpoint={trained}", *options]) == 0
    result = result_of(tmp_path)
    assert (result["execution"], result["execution_options"], result["network_evaluations"]) == ("sync", {}, 10)
    assert result["execution_steps"] == 4


def test_all_noise_is_the_policy_itself(trained: Path, tmp_path: Path) -> None:
    plain = ["episodes=2", "eval.videos=0"]
    rti = ["execution=rti", "rti.start=1", "rti.steps=10", "sim.num_envs=1"]
    for name, options in {"plain": plain, "rti": [*plain, *rti]}.items():
        assert main(["eval", f"checkpoint={trained}", *options, f"out={tmp_path / name}"]) == 0
    plain_rows, rti_rows = (result_of(tmp_path / name)["rows"] for name in ("plain", "rti"))
    assert [row["return"] for row in rti_rows] == pytest.approx([row["return"] for row in plain_rows], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["execution=rtj"], 2, "execution 'rtj' is unknown; nearest: rti (known: rti, sync)"),
        (
            ["execution=rti"],
            2,
            "{run} has no choice for real-time iteration with Ta = 8: make it with flowsteer rti checkpoint={run}, "
            "or set rti.start and rti.steps",
        ),
        (
            ["execution=rti", "rti.start=0.5", "horizon.execution_steps=2"],
            2,
            "{run} has no choice for real-time iteration with Ta = 2: make it with flowsteer rti checkpoint={run} "
            "horizon.execution_steps=2, or set rti.start and rti.steps",
        ),
        (["rti.start=0.5"], 2, "rti.start does nothing for execution=sync: set execution=rti or leave it out"),
        (["execution=rti", "rti.start=0.5", "rti.steps=0"], 1, "rti.steps must be at least 1, got 0"),
        (["execution=rti", "rti.start=1.5", "rti.steps=1"], 1, "rti.start must be in (0, 1], got 1.5"),
        (["horizon.execution_steps=16"], 1, "observation_steps - 1 + execution_steps must not exceed prediction_steps"),
    ],
)
def test_what_eval_refuses(
    trained: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    before = sorted(trained.iterdir())
    told = error_of(capsys, "eval", f"checkpoint={trained}", *options, code=code)
    assert told.startswith(message.format(run=trained)), told
    assert sorted(trained.iterdir()) == before


def test_a_choice_of_failures_alone_is_warned_of(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(
        UserWarning, match="no episode of the policy itself succeeded, so the choice rests on the maximum"
    ):
        assert main(["rti", f"checkpoint={copied}", *QUICK, f"out={copied}/measured"]) == 0
    assert "chosen: start=0.5 steps=1" in capsys.readouterr().out


def test_a_policy_of_one_step_has_nothing_to_save(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "last" / "config.yaml"
    config = stored(copied)
    file.write_text(yaml.safe_dump({**config, "policy": {**config["policy"], "steps": 1}}, sort_keys=False))
    told = error_of(capsys, "rti", f"checkpoint={copied}", *QUICK, code=1)
    assert told.endswith("takes one step as it is: real-time iteration has nothing to save")


def test_a_damaged_choice_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copied / "last" / "config.yaml"
    file.write_text(yaml.safe_dump({**stored(copied), "rti": {8: {"start": 0.5, "steps": 1, "hurry": True}}}))
    told = error_of(capsys, "eval", f"checkpoint={copied}", "execution=rti", code=1)
    assert told.startswith(f"{copied}: 'rti' in its config.yaml is damaged (")
    assert "'hurry'" in told
    for broken in ([0.5], {8: None}):
        file.write_text(yaml.safe_dump({**stored(copied), "rti": broken}))
        told = error_of(capsys, "eval", f"checkpoint={copied}", "execution=rti", code=1)
        assert told.startswith(f"{copied}: 'rti' in its config.yaml is damaged (not a table of options)")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "checkpoint= is missing: name a run folder"),
        (
            ["checkpoint={run}", "steps=1"],
            2,
            "option 'steps': invalid value assigned: int is not a ListConfig, list or tuple; "
            "a list is written 'steps=[a,b]'",
        ),
        (["checkpoint={run}", "steps=[1,0]"], 2, "steps must be positive, got 0"),
        (["checkpoint={run}", "starts=[0.5,1.5]"], 2, "starts must be in (0, 1], got 1.5"),
        (["checkpoint={run}", "starts=[0.0]"], 2, "starts must be in (0, 1], got 0.0"),
        (["checkpoint={run}", "starts=[]"], 2, "starts is empty: give at least one"),
        (["checkpoint={run}", "renoise=[]"], 2, "renoise is empty: give at least one"),
        (["checkpoint={run}", "tolerance=-1"], 2, "tolerance must not be negative, got -1.0"),
        (["checkpoint={run}", "refresh_every=-1"], 1, "rti.refresh_every must not be negative, got -1"),
        (["checkpoint={run}", "start=[0.5]"], 2, "no option 'start'; nearest: starts"),
    ],
)
def test_what_rti_refuses(
    trained: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    before = sorted(trained.iterdir())
    told = error_of(capsys, "rti", *(option.format(run=trained) for option in options), code=code)
    assert told.startswith(message), told
    assert sorted(trained.iterdir()) == before
    assert "rti" not in stored(trained)


def test_a_family_that_does_not_denoise_is_refused(
    dataset: Path, tmp_path: Path, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run, own = tmp_path / "gaussian", [option for option in tiny if "network" not in option]
    options = ["policy=gaussian", "policy.hidden=[8]", "train.steps=2", *own]
    assert main(["train", f"dataset={dataset}", f"out={run}", *options]) == 0
    for command in (["rti"], ["eval", "execution=rti"]):
        told = error_of(capsys, *command, f"checkpoint={run}", code=1)
        assert told.endswith("GaussianPolicy does not denoise: use policy=diffusion or policy=flow")


def row(steps: int, success: float, max_reward: float, high: float | None = None) -> dict[str, Any]:
    interval = {"mean": success, "low": 0.0, "high": success + 0.1 if high is None else high}
    return {"steps": steps, "success": interval, "max_reward": {"mean": max_reward}}


def test_the_fewest_steps_that_lose_little_are_chosen() -> None:
    reference, worse, two = row(10, 0.8, 0.95), row(1, 0.8, 0.91), row(2, 0.9, 0.97)
    one, better = row(1, 0.75, 0.93), row(1, 0.78, 0.925)
    assert choose([reference, worse, two, one, better], 0.03) is better
    assert choose([reference, worse, two], 0.03) is two
    # As high a reward, but of what was solved far less is.
    assert choose([reference, row(1, 0.3, 0.95, high=0.5), two], 0.03) is two
    assert choose([reference, worse], 0.03) is None


def test_without_a_good_choice_the_checkpoint_stays_as_it_was(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowsteer.cli.rti.choose", lambda rows, tolerance: None)
    told = error_of(capsys, "rti", f"checkpoint={copied}", *QUICK, code=1)
    assert told.startswith(f"nothing that was tried keeps the score of {copied}: the best, start=0.5 steps=1, loses ")
    assert "rti" not in stored(copied)
    assert json.loads((copied / "rti-1x2000000" / "rti.json").read_text())["chosen"] is None
