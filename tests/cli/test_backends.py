"""The commands that step a task, in every back end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowsteer.cli.main import main

pytest.importorskip("mujoco")


def judged(checkpoint: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of two episodes."""
    fixed = ("episodes=2", "eval.videos=0", "device=cpu", f"out={out}")
    assert main(["eval", f"checkpoint={checkpoint}", *options, *fixed]) == 0
    rows: list[dict[str, Any]] = json.loads((out / "eval.json").read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def hopping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy falls within some 20 steps."""
    pytest.importorskip("gymnasium.envs.mujoco", reason="the hopper's model is Gymnasium's")
    folder = tmp_path_factory.mktemp("hopping") / "run"
    horizon = ("horizon.observation_steps=1", "horizon.prediction_steps=4", "horizon.execution_steps=4")
    training = (
        "train.env_steps=100",
        "train.decisions=8",
        "train.epochs=1",
        "train.batch_size=64",
        "train.critic_batch_size=32",
        "train.evaluate_every=0",
        "critic.hidden=[16]",
    )
    options = ("task=hopper", "policy=gaussian", "algo=ppo", "sim.num_envs=4", "device=cpu", *horizon, *training)
    assert main(["finetune", *options, f"out={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def on_threads(hopping: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return judged(hopping, tmp_path_factory.mktemp("threads") / "out", "sim.backend=threads")


@pytest.mark.parametrize(("backend", "package"), [("gym", "mujoco"), ("ray", "ray"), ("warp", "mujoco_warp")])
def test_an_evaluation_is_that_on_threads(
    backend: str, package: str, hopping: Path, on_threads: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    rows = judged(hopping, tmp_path / "out", f"sim.backend={backend}")
    assert len(rows) == 2
    for row, wanted in zip(rows, on_threads, strict=True):
        # Warp computes in float32.
        assert row == {key: pytest.approx(value, rel=1e-3) for key, value in wanted.items()}


def test_randomised_worlds_are_those_of_the_checkpoints_task(
    dataset: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run, ranges = tmp_path / "run", "task.randomize={body_mass: [5, 9], geom_friction: [0.1, 0.2]}"
    options = ("task=pusht_mj", ranges, "train.steps=2", "seed=1")
    assert main(["train", f"dataset={dataset}", f"out={run}", *tiny, *options]) == 0
    randomised = [judged(run, tmp_path / backend, f"sim.backend={backend}") for backend in ("threads", "gym")]
    assert randomised[0] == randomised[1]
    assert judged(run, tmp_path / "plain", "task=pusht_mj") != randomised[0]


def test_a_field_that_cannot_be_randomised_is_one_line(
    dataset: Path, tiny: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("task=pusht_mj", "task.randomize={body_quat: [1, 2]}", "train.evaluate_every=2", "train.steps=2")
    assert main(["train", f"dataset={dataset}", f"out={tmp_path / 'run'}", *tiny, *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: randomize.body_quat holds directions of length 1"), error
